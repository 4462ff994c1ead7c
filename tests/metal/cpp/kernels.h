// The kernels of the compiled .metal files, by the names that the host asks for. The tables are made by sources.py.
#pragma once

#include "threads.h"

#include <cstdint>
#include <cstddef>
#include <map>
#include <string>
#include <vector>

#ifdef MTL_MUTANTS
extern int mtl_mutant; // number of the fault that is present, 0: none
#endif

static constexpr int MTL_N_BUFFERS = 31;

// what is bound when a kernel is dispatched
struct mtl_arguments {
    std::vector<char> bytes[MTL_N_BUFFERS];
    char *            buffer[MTL_N_BUFFERS] = {};
    bool              has_buffer[MTL_N_BUFFERS] = {};
};

struct mtl_kernel {
    const char * name;
    void (*launch)(const mtl_arguments & args, const mtl_context & context);
    int n_shared; // parameters in threadgroup memory
};

enum mtl_constant_type { MTL_BOOL, MTL_INT16, MTL_INT32, MTL_OTHER };

struct mtl_constant {
    const char *      name;
    int               index;
    mtl_constant_type type;
    void (*set)(int value);
};

struct mtl_library {
    const char *              file; // a .metal file
    std::vector<mtl_kernel>   kernels;
    std::vector<mtl_constant> constants;
};

std::vector<const mtl_library *> & mtl_libraries();

struct mtl_register {
    explicit mtl_register(const mtl_library * library) { mtl_libraries().push_back(library); }
};

//
// converts what is bound to the type of a kernel's parameter
//

struct mtl_bytes {
    const mtl_arguments & args;
    int index;

    template <typename T> operator T &() const {
        if (args.bytes[index].size() != sizeof(T)) {
            mtl_fail("argument %d has %zu bytes, the kernel expects %zu", index, args.bytes[index].size(), sizeof(T));
        }
        return *(T *) args.bytes[index].data();
    }
};

struct mtl_buffer {
    const mtl_arguments & args;
    int index;

    template <typename T> operator T *() const {
        if (!args.has_buffer[index]) {
            mtl_fail("buffer %d is not set", index);
        }
        return (T *) args.buffer[index];
    }
};

struct mtl_shared {
    const mtl_context & context;

    template <typename T> operator T *() const { return (T *) context.shared; }
};

// a position or a size, as a vector or its first component
struct mtl_position {
    const uint32_t * v;

    template <typename T> operator T() const {
        if constexpr (std::is_integral_v<T>) {
            return (T) v[0];
        } else {
            T res;
            for (size_t i = 0; i < sizeof(res.v)/sizeof(res.v[0]); i++) {
                res.v[i] = v[i];
            }
            return res;
        }
    }
};
