#pragma once

// A device that does later what it is asked to do, in order by backend, as on a GPU's streams: each on a thread of its own, or as late as
// can be, when somebody waits for it. Its memory is not the host's for the scheduler, and copies from and to it do not wait for what is under
// way, as CUDA's on a stream of their own do not; copies that are asked for in order read their source when it is their turn, as those from
// pinned memory do. So whoever reads a result too early, or overwrites what is still to be read, gets wrong numbers, and ThreadSanitizer says
// where.

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

struct async_device {
    const char * name;
    const bool   threaded;
    const bool   has_events;
    bool         uses_host = false; // computes in the host's memory as well
    bool         offloads  = false; // experts of batches from 32 tokens on, wherever they are
    bool         pins      = false; // has memory of the host's that it copies from fast
    bool         copies    = false; // within its memory, and one backend can wait for another

    size_t n_pinned = 0; // bytes copied from there to experts
    size_t n_beside = 0; // bytes copied within its memory

    struct stream;

    // a place in a stream's work
    struct event {
        stream * of      = nullptr;
        size_t   n_asked = 0;
        size_t   n_done  = 0;
    };

    // a backend's work
    struct stream {
        async_device & device;

        std::deque<std::function<void()>> work;
        int                               n_graphs = 0; // of it
        bool                              stop     = false;
        std::thread                       thread;

        explicit stream(async_device & device);
        ~stream();
        stream(const stream &) = delete;
        stream & operator=(const stream &) = delete;

        void push(std::function<void()> f);
        void wait(const std::function<bool()> & done);
        void run();
    };

    ggml_backend_device dev = {};
    ggml_backend_reg    reg = {};
    ggml_backend_buffer_type buft   = {};
    ggml_backend_buffer_type pinned = {};
    std::map<const char *, size_t> pinned_at;

    ggml_backend_ptr        cpu; // computes
    std::mutex              computing;
    std::vector<stream *>   streams;
    std::mutex              mutex;
    std::condition_variable changed;

    async_device(const char * name, bool threaded, bool has_events);
    async_device(const async_device &) = delete;
    async_device & operator=(const async_device &) = delete;

    // with a graph, and not only with copies
    bool computes() {
        std::lock_guard<std::mutex> lock(mutex);
        return std::any_of(streams.begin(), streams.end(), [](const stream * s) { return s->n_graphs > 0; });
    }

    // until it is so far as it was to be then
    void wait(const event & e, stream * of, size_t n) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (e.n_done >= n) {
                return; // the stream may be gone
            }
        }
        of->wait([&e, n]() { return e.n_done >= n; });
    }
};

inline async_device::stream::stream(async_device & device) : device(device) {
    {
        std::lock_guard<std::mutex> lock(device.mutex);
        device.streams.push_back(this);
    }
    if (device.threaded) {
        thread = std::thread([this]() { run(); });
    }
}

inline async_device::stream::~stream() {
    wait([this]() { return work.empty(); });
    {
        std::lock_guard<std::mutex> lock(device.mutex);
        stop = true;
        device.streams.erase(std::find(device.streams.begin(), device.streams.end(), this));
        device.changed.notify_all();
    }
    if (thread.joinable()) {
        thread.join();
    }
}

inline void async_device::stream::push(std::function<void()> f) {
    std::lock_guard<std::mutex> lock(device.mutex);
    work.push_back(std::move(f));
    device.changed.notify_all();
}

// no longer than until this holds
inline void async_device::stream::wait(const std::function<bool()> & done) {
    std::unique_lock<std::mutex> lock(device.mutex);
    for (; !device.threaded && !done(); work.pop_front()) {
        lock.unlock();
        work.front()();
        lock.lock();
    }
    device.changed.wait(lock, done);
}

inline void async_device::stream::run() {
    std::unique_lock<std::mutex> lock(device.mutex);
    for (;;) {
        device.changed.wait(lock, [this]() { return stop || !work.empty(); });
        if (work.empty()) {
            return;
        }
        std::function<void()> & f = work.front(); // stays where it is while others are added
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::microseconds(200)); // under way when the host goes on
        f();
        lock.lock();
        work.pop_front();
        device.changed.notify_all();
    }
}

namespace async_impl {

// a graph as it is now: the host may build the next one while this one waits
struct graph {
    std::unordered_map<const ggml_tensor *, ggml_tensor> tensors;
    ggml_context_ptr ctx;
    ggml_cgraph    * copy;

    explicit graph(ggml_cgraph * g) {
        const int    n_nodes = ggml_graph_n_nodes(g);
        const size_t size    = std::max(n_nodes, 1);
        ctx.reset(ggml_init({ ggml_graph_overhead_custom(size, false), nullptr, true }));
        copy = ggml_new_graph_custom(ctx.get(), size, false);

        const auto add = [this](const ggml_tensor * t) { return &tensors.emplace(t, *t).first->second; };
        for (int i = 0; i < n_nodes; i++) {
            ggml_graph_add_node(copy, add(ggml_graph_node(g, i)));
        }
        for (int i = 0; i < n_nodes; i++) {
            for (ggml_tensor * & src : ggml_graph_node(copy, i)->src) {
                src = src ? add(src) : nullptr;
            }
        }
    }
    graph(const graph &) = delete;
    graph & operator=(const graph &) = delete;
};

static async_device::stream * stream_of(ggml_backend_t backend) { return (async_device::stream *) backend->context; }
static async_device * of(ggml_backend_t backend) { return &stream_of(backend)->device; }
static async_device * of(ggml_backend_dev_t dev) { return (async_device *) dev->context; }

static const ggml_backend_buffer_i BUFFER = {
    /* .free_buffer   = */ [](ggml_backend_buffer_t buffer) { free(buffer->context); },
    /* .get_base      = */ [](ggml_backend_buffer_t buffer) { return buffer->context; },
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ [](ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offs, size_t size) { memset((char *) t->data + offs, value, size); },
    /* .set_tensor    = */ [](ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offs, size_t size) { memcpy((char *) t->data + offs, data, size); },
    /* .get_tensor    = */ [](ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offs, size_t size) { memcpy(data, (const char *) t->data + offs, size); },
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ [](ggml_backend_buffer_t buffer, uint8_t value) { memset(buffer->context, value, buffer->size); },
    /* .reset         = */ nullptr,
};

static ggml_backend_buffer_t alloc(ggml_backend_buffer_type_t buft, size_t size) {
    void * data = aligned_alloc(64, (size + 63)/64*64 + 64);
    return data ? ggml_backend_buffer_init(buft, BUFFER, data, size) : nullptr;
}

static ggml_backend_buffer_t alloc_pinned(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = alloc(buft, size);
    of(buft->device)->pinned_at[(const char *) buffer->context] = size;
    buffer->iface.free_buffer = [](ggml_backend_buffer_t buffer) {
        of(buffer->buft->device)->pinned_at.erase((const char *) buffer->context);
        free(buffer->context);
    };
    return buffer;
}

static void set_async(ggml_backend_t backend, ggml_tensor * t, const void * data, size_t offs, size_t size) {
    for (const auto & [begin, length] : of(backend)->pinned_at) {
        of(backend)->n_pinned += data >= begin && data < begin + length && strstr(t->name, "exps") ? size : 0;
    }
    stream_of(backend)->push([to = (char *) t->data + offs, data, size]() { memcpy(to, data, size); });
}

static void get_async(ggml_backend_t backend, const ggml_tensor * t, void * data, size_t offs, size_t size) {
    stream_of(backend)->push([from = (const char *) t->data + offs, data, size]() { memcpy(data, from, size); });
}

static bool copy_async(ggml_backend_t from, ggml_backend_t to, const ggml_tensor * src, ggml_tensor * dst) {
    if (from != to || ggml_backend_buffer_is_host(src->buffer) || ggml_backend_buffer_is_host(dst->buffer)) {
        return false;
    }
    of(to)->n_beside += ggml_nbytes(dst);
    stream_of(to)->push([data = src->data, at = dst->data, size = ggml_nbytes(dst)]() { memcpy(at, data, size); });
    return true;
}

static void record(ggml_backend_t backend, ggml_backend_event_t event) {
    async_device::event & e = *(async_device::event *) event->context;
    e.of = stream_of(backend);
    e.n_asked++; // only the host looks at it
    e.of->push([&e, d = of(backend), n = e.n_asked]() {
        std::lock_guard<std::mutex> lock(d->mutex);
        e.n_done = n;
    });
}

static void wait_for(ggml_backend_t backend, ggml_backend_event_t event) {
    async_device::event & e = *(async_device::event *) event->context;
    stream_of(backend)->push([&e, of = e.of, n = e.n_asked]() { of->device.wait(e, of, n); });
}

static ggml_status compute(ggml_backend_t backend, ggml_cgraph * cgraph) {
    async_device::stream * s = stream_of(backend);
    auto g = std::make_shared<graph>(cgraph);
    {
        std::lock_guard<std::mutex> lock(s->device.mutex);
        s->n_graphs++;
    }
    s->push([s, g]() {
        {
            std::lock_guard<std::mutex> lock(s->device.computing);
            GGML_ASSERT(ggml_backend_graph_compute(s->device.cpu.get(), g->copy) == GGML_STATUS_SUCCESS);
        }
        std::lock_guard<std::mutex> lock(s->device.mutex);
        s->n_graphs--;
    });
    return GGML_STATUS_SUCCESS;
}

static ggml_backend_t init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 0x61, 0x73, 0x79, 0x6e, 0x63 };

    ggml_backend_i iface = {};
    iface.get_name         = [](ggml_backend_t backend) { return of(backend)->name; };
    iface.free             = [](ggml_backend_t backend) { delete stream_of(backend); delete backend; };
    iface.set_tensor_async = set_async;
    iface.get_tensor_async = get_async;
    iface.synchronize      = [](ggml_backend_t backend) {
        async_device::stream * s = stream_of(backend);
        s->wait([s]() { return s->work.empty(); });
    };
    iface.graph_compute    = compute;
    iface.event_record     = record;
    if (of(dev)->copies) {
        iface.cpy_tensor_async = copy_async;
        iface.event_wait       = wait_for;
    }
    return new ggml_backend { &guid, iface, dev, new async_device::stream(*of(dev)) };
}

} // namespace async_impl

inline async_device::async_device(const char * name, bool threaded, bool has_events) : name(name), threaded(threaded), has_events(has_events) {
    using namespace async_impl;

    cpu.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    ggml_backend_cpu_set_n_threads(cpu.get(), 1); // threads that wait for each other spin: slow when there are more of them than cores

    dev.context = reg.context = this;
    dev.reg = &reg;
    reg.api_version = GGML_BACKEND_API_VERSION;
    reg.iface.get_name         = [](ggml_backend_reg_t reg) { return ((async_device *) reg->context)->name; };
    reg.iface.get_device_count = [](ggml_backend_reg_t) -> size_t { return 1; };
    reg.iface.get_device       = [](ggml_backend_reg_t reg, size_t) { return &((async_device *) reg->context)->dev; };

    dev.iface.get_name        = [](ggml_backend_dev_t dev) { return of(dev)->name; };
    dev.iface.get_description = dev.iface.get_name;
    dev.iface.get_memory      = [](ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = (size_t) 8 << 30; };
    dev.iface.get_type        = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    dev.iface.get_props       = [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
        *props = {};
        props->name        = of(dev)->name;
        props->description = of(dev)->name;
        props->type        = GGML_BACKEND_DEVICE_TYPE_GPU;
        props->caps.async  = true;
        props->caps.events = of(dev)->has_events;
        ggml_backend_dev_memory(dev, &props->memory_free, &props->memory_total);
    };
    dev.iface.init_backend    = init;
    dev.iface.get_buffer_type = [](ggml_backend_dev_t dev) { return &of(dev)->buft; };
    dev.iface.supports_op     = [](ggml_backend_dev_t, const ggml_tensor * op) { return op->op != GGML_OP_CUSTOM && op->op != GGML_OP_MAP_CUSTOM1; };
    dev.iface.supports_buft   = [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
        return buft == &of(dev)->buft || (of(dev)->uses_host && ggml_backend_buft_is_host(buft));
    };

    dev.iface.offload_op      = [](ggml_backend_dev_t dev, const ggml_tensor * op) {
        return of(dev)->offloads && op->op == GGML_OP_MUL_MAT_TIERS && op->ne[2] >= 32;
    };
    dev.iface.get_host_buffer_type = [](ggml_backend_dev_t dev) { return of(dev)->pins ? &of(dev)->pinned : nullptr; };

    if (has_events) {
        dev.iface.event_new         = [](ggml_backend_dev_t dev) { return new ggml_backend_event { dev, new event }; };
        dev.iface.event_free        = [](ggml_backend_dev_t dev, ggml_backend_event_t e) {
            event * at = (event *) e->context;
            of(dev)->wait(*at, at->of, at->n_asked);
            delete at;
            delete e;
        };
        dev.iface.event_synchronize = [](ggml_backend_dev_t dev, ggml_backend_event_t e) {
            const event & at = *(event *) e->context;
            of(dev)->wait(at, at.of, at.n_asked);
        };
    }

    buft.device = &dev;
    buft.iface.get_name      = [](ggml_backend_buffer_type_t buft) { return of(buft->device)->name; };
    buft.iface.alloc_buffer  = alloc;
    buft.iface.get_alignment = [](ggml_backend_buffer_type_t) -> size_t { return 64; };

    pinned = buft;
    pinned.iface.alloc_buffer = alloc_pinned;
    pinned.iface.is_host      = [](ggml_backend_buffer_type_t) { return true; };
}
