// Busy experts in fast memory, on a device behind RPC: several contexts and models at a time, and a device that is short of memory.
// Whatever happens, the logits are those of a model that is wholly on the device, bit for bit. For tests/hot and tools/sanitize_hot.sh.
//
//   exchange serve PORT MEMORY        a device; MEMORY is a file to say how much it has
//   exchange MODEL PORT MEMORY CASE   exit status 0 if all holds

#include "ggml-backend-impl.h" // to make a device refuse memory
#include "ggml-cpu.h"
#include "ggml-cpp.h"
#include "ggml-rpc.h"
#include "llama-cpp.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "line %d: %s\n", __LINE__, #x); exit(1); } } while (0)

static const int N_PROMPT = 48;
static const int N_DECODE = 100; // some exchanges

//
// log
//

static std::mutex  log_mutex;
static std::string log_text;

static void add_to_log(ggml_log_level level, const char * text, void * data) {
    GGML_UNUSED(data);
    std::lock_guard<std::mutex> lock(log_mutex);
    log_text += text;
    if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR || strstr(text, "llama_hot")) {
        fputs(text, stderr);
    }
}

// how often it was said since the last question
static int said(const std::string & what) {
    std::lock_guard<std::mutex> lock(log_mutex);
    int n = 0;
    for (size_t at = log_text.find(what); at != std::string::npos; at = log_text.find(what, at + 1)) {
        n++;
    }
    log_text.clear();
    return n;
}

//
// a device whose memory ends: what the server may allocate is in a file that both map
//

struct memory {
    std::atomic<size_t> used;
    std::atomic<size_t> total; // 0: no limit
};

static memory * shared;

static void map_memory(const char * path) {
    const int fd = open(path, O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0 && ftruncate(fd, sizeof(memory)) == 0);
    void * at = mmap(nullptr, sizeof(memory), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(at != MAP_FAILED);
    close(fd);
    shared = (memory *) at;
}

static decltype(ggml_backend_buffer_type_i::alloc_buffer) server_alloc;
static decltype(ggml_backend_buffer_i::free_buffer)       server_free;

static void free_counted(ggml_backend_buffer_t buffer) {
    shared->used -= buffer->size;
    server_free(buffer);
}

static ggml_backend_buffer_t alloc_counted(ggml_backend_buffer_type_t buft, size_t size) {
    if (shared->total > 0 && shared->used + size > shared->total) {
        return nullptr;
    }
    ggml_backend_buffer_t buffer = server_alloc(buft, size);
    server_free = buffer->iface.free_buffer;
    buffer->iface.free_buffer = free_counted;
    shared->used += buffer->size;
    return buffer;
}

static void serve(const char * port, const char * path) {
    map_memory(path);
    ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();
    server_alloc = buft->iface.alloc_buffer;
    buft->iface.alloc_buffer = alloc_counted;

    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_rpc_start_server(("127.0.0.1:" + std::string(port)).c_str(), nullptr, 1, 1, &cpu);
}

static ggml_backend_dev_t device;

static size_t memory_said; // memory that the device reports, 0: it does not say

// in use on the device, once it has done all that it was asked to
static size_t memory_used(size_t expected_at_most = SIZE_MAX) {
    for (int i = 0; i < 500; i++) {
        const size_t used = shared->used;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        if (used == shared->used && used <= expected_at_most) {
            break;
        }
    }
    return shared->used;
}

static void say_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) {
    GGML_UNUSED(dev);
    *total = memory_said;
    *free  = memory_said - std::min<size_t>(memory_said, shared->used);
}

//
// models
//

static const char * model_path;

// for ThreadSanitizer, with EXCHANGE_RACE=1 in the environment: contexts compute at the same time, on more threads. A device behind RPC
// may then compute one context's graph for another one (it remembers the last graph without a lock), so logits are not compared
static bool       race = false;
static std::mutex turn;

static llama_model_ptr load(const char * vram) {
    llama_model_kv_override overrides[3] = {};
    const char * options[2][2] = { { "rq.vram", vram }, { "rq.vram_layout", "slots" } };
    for (int i = 0; i < 2; i++) {
        overrides[i].tag = LLAMA_KV_OVERRIDE_TYPE_STR;
        snprintf(overrides[i].key,     sizeof(overrides[i].key),     "%s", options[i][0]);
        snprintf(overrides[i].val_str, sizeof(overrides[i].val_str), "%s", options[i][1]);
    }

    ggml_backend_dev_t devices[] = { device, nullptr };

    llama_model_params params = llama_model_default_params();
    params.devices      = devices;
    params.n_gpu_layers = 999;
    params.kv_overrides = overrides;
    params.use_extra_bufts = false; // repacked weights are multiplied in another order

    llama_model_ptr model(llama_model_load_from_file(model_path, params));
    CHECK(model);
    return model;
}

static llama_context * new_context(llama_model * model, int n_ctx = 512) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.n_threads       = race ? 2 : 1;
    params.n_threads_batch = params.n_threads;

    return llama_init_from_model(model, params);
}

using logits_t = std::vector<float>;

// a prompt of the text-like kind, whose words return, then greedy decoding
static logits_t read(llama_context * ctx, int seed) {
    const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));
    const int n_vocab = llama_vocab_n_tokens(vocab);

    llama_memory_clear(llama_get_memory(ctx), true);

    std::vector<llama_token> tokens;
    uint32_t x = seed;
    for (int i = 0; i < N_PROMPT; i++) {
        x = x*1664525u + 1013904223u;
        tokens.push_back(300 + (x >> 16) % (100 + 40*seed));
    }

    logits_t res;
    for (int i = 0; i <= N_DECODE; i++) {
        {
            std::unique_lock<std::mutex> lock(turn, std::defer_lock);
            if (!race) {
                lock.lock();
            }
            CHECK(llama_decode(ctx, llama_batch_get_one(tokens.data(), tokens.size())) == 0);
        }
        const float * logits = llama_get_logits_ith(ctx, -1);
        res.insert(res.end(), logits, logits + (race ? 0 : n_vocab));
        tokens = { (llama_token) (std::max_element(logits, logits + n_vocab) - logits) };
    }
    return res;
}

static logits_t reference(int seed) {
    llama_model_ptr   model = load("100%");
    llama_context_ptr ctx(new_context(model.get()));
    return read(ctx.get(), seed);
}

static void together(const std::vector<std::function<void()>> & work) {
    std::vector<std::thread> threads;
    for (const auto & w : work) {
        threads.emplace_back(w);
    }
    for (auto & t : threads) {
        t.join();
    }
}

//
// cases
//

// experts are exchanged while there is one context, not while there are two
static void test_two_contexts() {
    const logits_t ref_1 = reference(1);
    const logits_t ref_2 = reference(2);

    llama_model_ptr   model = load("50%");
    llama_context_ptr first(new_context(model.get()));
    CHECK(read(first.get(), 1) == ref_1);

    for (int i = 0; i < 2; i++) {
        llama_context_ptr second;
        together({
            [&]() { CHECK(read(first.get(), 2) == ref_2); },
            [&]() {
                second.reset(new_context(model.get()));
                CHECK(second);
                CHECK(read(second.get(), 1) == ref_1);
            },
        });
        CHECK(said("several contexts use the model") == 1);
        CHECK(read(first.get(), 1) == ref_1);
        second.reset();
        CHECK(read(first.get(), 2) == ref_2);
    }
    first.reset();
    CHECK(said("experts in fast memory took") == 1);
}

static void test_two_models() {
    const logits_t ref_1 = reference(1);
    const logits_t ref_2 = reference(2);

    llama_model_ptr models[] = { load("50%"), load("25%") };

    llama_context_ptr ctxs[2];
    for (int i = 0; i < 2; i++) {
        ctxs[i].reset(new_context(models[i].get()));
        CHECK(ctxs[i]);
    }
    together({
        [&]() { CHECK(read(ctxs[0].get(), 1) == ref_1); CHECK(read(ctxs[0].get(), 2) == ref_2); },
        [&]() { CHECK(read(ctxs[1].get(), 2) == ref_2); CHECK(read(ctxs[1].get(), 1) == ref_1); },
    });
    ctxs[0].reset();
    models[0].reset();
    CHECK(read(ctxs[1].get(), 2) == ref_2);
    ctxs[1].reset();
    CHECK(said("experts in fast memory took") == 2);
}

static void test_memory() {
    device->iface.get_memory = say_memory;

    const logits_t ref = reference(1);
    CHECK(memory_used(0) == 0);

    // what all but the experts, half of them, and a context take
    llama_model_ptr   model = load("0%");
    const size_t      none  = memory_used();
    llama_context_ptr ctx(new_context(model.get()));
    const size_t      small = memory_used() - none;
    CHECK(read(ctx.get(), 1) == ref);
    ctx.reset();
    model.reset();
    CHECK(memory_used(0) == 0);
    model = load("50%");
    const size_t half = memory_used() - none;
    model.reset();
    CHECK(memory_used(0) == 0 && half > 0 && said("has no room") == 0);

    const auto check = [&](const char * what, bool any, size_t at_load, size_t at_context) {
        shared->total = at_load;
        model = load("50%");
        shared->total = at_context;
        ctx.reset(new_context(model.get()));
        CHECK(ctx);
        const size_t used = memory_used();
        CHECK(used < none + half + small && (used > none + small) == any);
        CHECK(read(ctx.get(), 1) == ref);
        CHECK(said(what) > 0);
        ctx.reset();
        model.reset();
        CHECK(memory_used(0) == 0);
    };

    // the device says how much it has, and half a gigabyte is left to the context
    memory_said = none + 512*1048576ull + 3*half/4;
    check("has no room for", true, 0, 0);
    memory_said = none + 512*1048576ull;
    check("has no room for", false, 0, 0);

    // it says nothing, the slots are refused
    memory_said = 0;
    check("has no room for", true,  none + half/2, 0);
    check("has no room for", false, none + 1000,   0);

    // the slots are not refused, the context is
    check("no room for a context beside", true,  0, none + small + half - 1000);
    check("no room for a context beside", true,  0, none + small + half/4);
    check("no room for a context beside", false, 0, none + small + 1000);

    // too little for a context in any case, or beside another one
    model = load("50%");
    shared->total = none + small/2;
    CHECK(!new_context(model.get()));
    CHECK(said("failed to initialize the context") == 1);
    shared->total = 0;
    model = load("50%");
    ctx.reset(new_context(model.get()));
    shared->total = memory_used() + small/2;
    CHECK(!new_context(model.get()));
    CHECK(said("no room for a context beside") == 0);
    CHECK(read(ctx.get(), 1) == ref);
}

int main(int argc, char ** argv) {
    static const std::map<std::string, void (*)()> cases = {
        { "contexts", test_two_contexts },
        { "models",   test_two_models   },
        { "memory",   test_memory       },
    };
    if (argc == 4 && strcmp(argv[1], "serve") == 0) {
        serve(argv[2], argv[3]);
        return 1;
    }
    if (argc != 5 || !cases.count(argv[4])) {
        return 2;
    }
    map_memory(argv[3]);
    shared->total = 0;

    llama_log_set(add_to_log, nullptr);
    llama_backend_init();

    ggml_backend_reg_t reg = ggml_backend_rpc_add_server(("127.0.0.1:" + std::string(argv[2])).c_str());
    CHECK(reg);
    ggml_backend_register(reg);
    device = ggml_backend_reg_dev_get(reg, 0);

    model_path = argv[1];
    race = getenv("EXCHANGE_RACE") != nullptr;
    cases.at(argv[4])();

    llama_backend_free();
    return 0;
}
