// Metal threads on a CPU: one fiber per thread of a threadgroup, switched at barriers and simdgroup operations.
//
// All threads run on one thread of the operating system, so a schedule is reproducible from its number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

struct mtl_context {
    uint32_t threadgroup[3];      // position in the grid
    uint32_t n_threadgroups[3];
    uint32_t n_threads[3];        // of a threadgroup
    uint32_t thread[3];           // position in the threadgroup
    uint32_t index;               // in the threadgroup
    uint32_t lane;                // in the simdgroup
    uint32_t simdgroup;
    char   * shared;              // threadgroup memory
    size_t   shared_size;
};

struct mtl_dispatch {
    const char * name;
    uint32_t n_threadgroups[3];
    uint32_t n_threads[3];
    size_t   shared_size;
    std::function<void()>                    select; // sets the function constants
    std::function<void(const mtl_context &)> body;   // runs the kernel for one thread
};

// 0: dispatches, threadgroups and threads in order
// 1: all of them in reverse
// 2 and more, a seed: threadgroups of all dispatches mixed, several at a time; a simdgroup that is chosen at random runs until it waits
void mtl_run(const std::vector<mtl_dispatch> & dispatches, int schedule);

// prints to stderr where the running thread is and exits
[[noreturn]] void mtl_fail(const char * format, ...) __attribute__((format(printf, 1, 2)));

// what the stand-in for <metal_stdlib> calls; site: line*256 + column of the call
void     mtl_wait_threadgroup(int site);
void     mtl_wait_simdgroup(int site);
void     mtl_note(int site);                      // an operation of a simdgroup without a rendezvous: checked for divergence only
char   (*mtl_publish(const void * value, size_t size))[16]; // slots of the lanes of the simdgroup
uint64_t mtl_active_lanes();
uint32_t mtl_lane();
bool     mtl_is_first_lane();                     // lowest active lane

// memory that ends (to 16 bytes) where an unmapped page begins
char * mtl_guarded_alloc(size_t size, int fill);
void   mtl_guarded_free(char * data, size_t size);
