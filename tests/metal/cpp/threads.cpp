#include "threads.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>

static constexpr size_t STACK     = 64*1024;
static constexpr size_t PAGE      = 4096;
static constexpr int    LANES     = 32;
static constexpr int    AT_A_TIME = 3; // threadgroups of a random schedule

enum thread_state { READY, WAITS_THREADGROUP, WAITS_SIMDGROUP, DONE };

struct threadgroup;

struct thread {
    void       * sp;
    char       * stack;
    threadgroup* group;
    thread_state state;
    int          site;   // where it waits
    uint64_t     path;   // hash of the sites it has passed
    unsigned     turn;   // of the two sets of slots
    uint64_t     active; // lanes that took part in the last operation
    mtl_context  context;
};

struct simdgroup {
    int  first;
    int  n;
    int  n_live;
    int  n_waiting;
    char slots[2][LANES][16];
};

struct threadgroup {
    const mtl_dispatch * dispatch = nullptr;
    std::vector<thread>    threads;
    std::vector<simdgroup> simdgroups;
    std::vector<int>       order;
    int n_live    = 0;
    int n_waiting = 0;

    thread & at(const simdgroup & s, int i) { return threads[s.first + i]; }
};

static thread * current;
static void   * scheduler_sp;

__attribute__((naked, noinline)) static void switch_stack(void ** /*save*/, void * /*load*/) {
    asm volatile(
        "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15; movq %rsp,(%rdi); movq %rsi,%rsp;"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

void mtl_fail(const char * format, ...) {
    fflush(stdout);
    fprintf(stderr, "metal: ");
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    if (current) {
        const mtl_context & c = current->context;
        fprintf(stderr, " (%s, threadgroup %u %u %u, thread %u)", current->group->dispatch->name, c.threadgroup[0], c.threadgroup[1],
                c.threadgroup[2], c.index);
    }
    fprintf(stderr, "\n");
    exit(3);
}

//
// waiting
//

static void release_simdgroup(threadgroup & g, simdgroup & s) {
    uint64_t active = 0;
    for (int i = 0; i < s.n; i++) {
        if (g.at(s, i).state == WAITS_SIMDGROUP) {
            active |= 1ull << i;
        }
    }
    const thread * first = nullptr;
    for (int i = 0; i < s.n; i++) {
        thread & t = g.at(s, i);
        if (t.state != WAITS_SIMDGROUP) {
            continue;
        }
        if (!first) {
            first = &t;
        } else if (first->site != t.site || first->path != t.path) {
            mtl_fail("threads of a simdgroup diverge: one waits at line %d, another at line %d", first->site/256, t.site/256);
        }
        t.state  = READY;
        t.active = active; // a lane that returns right after the operation still counts for slower lanes
    }
    s.n_waiting = 0;
}

static void release_threadgroup(threadgroup & g) {
    const thread * first = nullptr;
    for (thread & t : g.threads) {
        if (t.state != WAITS_THREADGROUP) {
            continue;
        }
        if (!first) {
            first = &t;
        } else if (first->site != t.site) {
            mtl_fail("threads wait at different threadgroup barriers, lines %d and %d", first->site/256, t.site/256);
        }
        t.state = READY;
    }
    g.n_waiting = 0;
}

static void block() {
    switch_stack(&current->sp, scheduler_sp);
}

void mtl_note(int site) {
    current->path = current->path*1000003 + site;
}

void mtl_wait_threadgroup(int site) {
    mtl_note(site);
    current->site  = site;
    current->state = WAITS_THREADGROUP;
    threadgroup & g = *current->group;
    if (++g.n_waiting == g.n_live) {
        release_threadgroup(g);
    }
    block();
}

void mtl_wait_simdgroup(int site) {
    mtl_note(site);
    current->site  = site;
    current->state = WAITS_SIMDGROUP;
    threadgroup & g = *current->group;
    simdgroup   & s = g.simdgroups[current->context.simdgroup];
    if (++s.n_waiting == s.n_live) {
        release_simdgroup(g, s);
    }
    block();
}

char (*mtl_publish(const void * value, size_t size))[16] {
    auto * slots = current->group->simdgroups[current->context.simdgroup].slots[current->turn++ & 1];
    memcpy(slots[current->context.lane], value, size);
    return slots;
}

uint64_t mtl_active_lanes() {
    return current->active;
}

uint32_t mtl_lane() {
    return current->context.lane;
}

bool mtl_is_first_lane() {
    return (current->active & -current->active) == 1ull << current->context.lane;
}

static void thread_entry() {
    current->group->dispatch->body(current->context);
    current->state = DONE;
    threadgroup & g = *current->group;
    simdgroup   & s = g.simdgroups[current->context.simdgroup];
    s.n_live--;
    g.n_live--;
    if (s.n_live && s.n_waiting == s.n_live) {
        release_simdgroup(g, s);
    }
    if (g.n_live && g.n_waiting == g.n_live) {
        release_threadgroup(g);
    }
    block();
    abort();
}

//
// memory
//

static size_t padded_page(size_t size) {
    return (size + PAGE - 1) & ~(PAGE - 1);
}

static size_t padded_16(size_t size) {
    return (size + 15) & ~size_t(15);
}

char * mtl_guarded_alloc(size_t size, int fill) {
    const size_t pages = padded_page(size);
    char * base = (char *) mmap(nullptr, pages + 2*PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || (pages > 0 && mprotect(base + PAGE, pages, PROT_READ | PROT_WRITE) != 0)) {
        mtl_fail("no memory for %zu bytes", size);
    }
    memset(base + PAGE, fill, pages);
    return base + PAGE + pages - padded_16(size);
}

void mtl_guarded_free(char * data, size_t size) {
    const size_t pages = padded_page(size);
    munmap(data + padded_16(size) - pages - PAGE, pages + 2*PAGE);
}

static char * stack_get() {
    char * stack = (char *) mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) {
        mtl_fail("no memory for stacks");
    }
    mprotect(stack, PAGE, PROT_NONE);
    return stack;
}

// threadgroup memory, for reuse
static std::multimap<size_t, char *> shared_pool;

static char * shared_get(size_t size) {
    auto it = shared_pool.find(size);
    if (it == shared_pool.end()) {
        return mtl_guarded_alloc(size, 0xFF);
    }
    char * res = it->second;
    shared_pool.erase(it);
    return res;
}

//
// scheduling
//

struct job {
    const mtl_dispatch * dispatch;
    uint32_t             position[3];
};

static void start(threadgroup & g, const job & j, bool reverse) {
    const mtl_dispatch & d = *j.dispatch;

    const int n    = d.n_threads[0]*d.n_threads[1]*d.n_threads[2];
    const int n_sg = (n + LANES - 1)/LANES;

    g.dispatch = &d;
    while ((int) g.threads.size() < n) {
        thread t = {};
        t.stack = stack_get();
        g.threads.push_back(t);
    }
    while ((int) g.threads.size() > n) {
        munmap(g.threads.back().stack, STACK);
        g.threads.pop_back();
    }
    g.simdgroups.resize(n_sg);
    g.order.resize(n);

    char * shared = shared_get(d.shared_size);
    memset(shared, 0xFF, d.shared_size); // NaN: what was not written is noticed

    for (int i = 0; i < n_sg; i++) {
        simdgroup & s = g.simdgroups[i];
        s.first     = LANES*i;
        s.n         = s.n_live = std::min(LANES, n - LANES*i);
        s.n_waiting = 0;
        memset(s.slots, 0xFF, sizeof(s.slots));
    }
    g.n_live    = n;
    g.n_waiting = 0;

    for (int i = 0; i < n; i++) {
        thread & t = g.threads[i];
        const simdgroup & s = g.simdgroups[i/LANES];

        t.group  = &g;
        t.state  = READY;
        t.site   = 0;
        t.path   = 0;
        t.turn   = 0;
        t.active = (1ull << s.n) - 1;

        mtl_context & c = t.context;
        c = {};
        for (int k = 0; k < 3; k++) {
            c.threadgroup[k]    = j.position[k];
            c.n_threadgroups[k] = d.n_threadgroups[k];
            c.n_threads[k]      = d.n_threads[k];
        }
        c.thread[0]   = i % d.n_threads[0];
        c.thread[1]   = i / d.n_threads[0] % d.n_threads[1];
        c.thread[2]   = i / (d.n_threads[0]*d.n_threads[1]);
        c.index       = i;
        c.lane        = i % LANES;
        c.simdgroup   = i / LANES;
        c.shared      = shared;
        c.shared_size = d.shared_size;

        void ** top = (void **) (t.stack + STACK);
        top[-1] = nullptr;
        top[-2] = (void *) thread_entry;
        memset(top - 8, 0, 6*sizeof(void *));
        t.sp = top - 8;

        g.order[i] = reverse ? n - 1 - i : i;
    }
}

static void finish(threadgroup & g) {
    shared_pool.emplace(g.dispatch->shared_size, g.threads[0].context.shared);
}

// true if the thread could run
static bool resume(thread & t) {
    if (t.state != READY) {
        return false;
    }
    current = &t;
    switch_stack(&scheduler_sp, t.sp);
    current = nullptr;
    return true;
}

static void stuck(threadgroup & g) {
    for (thread & t : g.threads) {
        if (t.state != DONE) {
            current = &t;
            mtl_fail("deadlock: not all threads reach the barrier at line %d", t.site/256);
        }
    }
}

static void run_in_order(threadgroup & g) {
    g.dispatch->select();
    while (g.n_live) {
        bool any = false;
        for (int i : g.order) {
            any = resume(g.threads[i]) || any;
        }
        if (!any) {
            stuck(g);
        }
    }
}

static void run_mixed(const std::vector<job> & jobs, std::mt19937 & rng) {
    static std::vector<std::unique_ptr<threadgroup>> groups;
    while (groups.size() < AT_A_TIME) {
        groups.push_back(std::make_unique<threadgroup>());
    }

    std::vector<threadgroup *> running;
    std::vector<threadgroup *> idle;
    for (auto & g : groups) {
        idle.push_back(g.get());
    }

    const mtl_dispatch * selected = nullptr;

    size_t next = 0;
    while (next < jobs.size() || !running.empty()) {
        while (next < jobs.size() && !idle.empty()) {
            start(*idle.back(), jobs[next++], false);
            running.push_back(idle.back());
            idle.pop_back();
        }

        const size_t ig = rng() % running.size();
        threadgroup & g = *running[ig];
        if (selected != g.dispatch) {
            selected = g.dispatch;
            selected->select();
        }

        // a simdgroup that can run; it runs ahead of the others until all its threads wait for them
        const int n_sg = (int) g.simdgroups.size();
        const int s0   = rng() % n_sg;
        bool any = false;
        for (int i = 0; i < n_sg && !any; i++) {
            const simdgroup & s = g.simdgroups[(s0 + i) % n_sg];
            const int shift   = rng() % s.n;
            const int n_times = 1 + rng() % 64;
            for (int k = 0; k < n_times; k++) {
                bool more = false;
                for (int l = 0; l < s.n; l++) {
                    more = resume(g.at(s, (l + shift) % s.n)) || more;
                }
                any = any || more;
                if (!more) {
                    break;
                }
            }
        }
        if (g.n_live == 0) {
            finish(g);
            running.erase(running.begin() + ig);
            idle.push_back(&g);
        } else if (!any) {
            stuck(g);
        }
    }
}

void mtl_run(const std::vector<mtl_dispatch> & dispatches, int schedule) {
    std::vector<job> jobs;
    for (const mtl_dispatch & d : dispatches) {
        for (uint32_t z = 0; z < d.n_threadgroups[2]; z++) {
            for (uint32_t y = 0; y < d.n_threadgroups[1]; y++) {
                for (uint32_t x = 0; x < d.n_threadgroups[0]; x++) {
                    jobs.push_back({ &d, { x, y, z } });
                }
            }
        }
    }

    if (schedule >= 2) {
        std::mt19937 rng(schedule);
        std::shuffle(jobs.begin(), jobs.end(), rng);
        run_mixed(jobs, rng);
        return;
    }

    if (schedule == 1) {
        std::reverse(jobs.begin(), jobs.end());
    }
    static threadgroup g;
    for (const job & j : jobs) {
        start(g, j, schedule == 1);
        run_in_order(g);
        finish(g);
    }
}
