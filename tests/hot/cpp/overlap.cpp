// A layer's experts on the CPU and on a device at the same time, with a device that really works beside the host (async_device.h): who waits
// for whom, and that all numbers are those of one after the other. For tests/hot and tools/sanitize_hot.sh.
//
//   overlap order|thread MODEL.gguf     the device works as late as can be, or on its own thread; exit status 0 if all holds

#include "async_model.h"

#include "ggml-cpu.h"
#include "ggml-tiers.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <string>

static async_device * device; // the first one

// graphs that the CPU began to compute while the device computed, and while it did not
static std::atomic<int> n_beside{0};
static std::atomic<int> n_alone {0};

static decltype(ggml_backend_device_i::init_backend) cpu_init;
static decltype(ggml_backend_i::graph_compute)       cpu_compute;

static ggml_status compute_watched(ggml_backend_t backend, ggml_cgraph * graph) {
    (device->computes() ? n_beside : n_alone)++;
    return cpu_compute(backend, graph);
}

static ggml_backend_t init_watched(ggml_backend_dev_t dev, const char * params) {
    ggml_backend_t backend = cpu_init(dev, params);
    cpu_compute = backend->iface.graph_compute;
    backend->iface.graph_compute = compute_watched;
    return backend;
}

// for all CPU backends from now on
static void watch_cpu() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    cpu_init = cpu->iface.init_backend;
    cpu->iface.init_backend = init_watched;
}

// of so many graphs that the CPU computed since the last question, so many while the device computed
static void check_order(int beside, int all) {
    CHECK(n_beside + n_alone == all);
    CHECK(device->threaded ? n_beside <= beside : n_beside == beside); // a device on a thread may be done already
    n_beside = n_alone = 0;
}

//
// by hand
//

static const int N        = 4096;
static const int N_LAYERS = 3;

enum layout {
    INDEPENDENT,  // neither part needs anything of the other
    UNMARKED,     // the same without the flag
    NEEDS_RESULT, // the CPU needs the device's part
    OVERWRITES,   // the device's part overwrites what the CPU needs
    SHARES,       // the device writes to the host's memory, what the CPU reads without knowing of it
    ELSEWHERE,    // what follows is on another device
    NO_INPUTS,    // the CPU needs nothing of a device
};

static void add_one(ggml_tensor * dst, const ggml_tensor * a, int ith, int nth, void *) {
    for (int64_t i = ith; i < ggml_nelements(dst); i += nth) {
        ((float *) dst->data)[i] = ((const float *) a->data)[i] + 1.0f;
    }
}

static void add_one_and(ggml_tensor * dst, const ggml_tensor * a, const ggml_tensor * b, int ith, int nth, void *) {
    for (int64_t i = ith; i < ggml_nelements(dst); i += nth) {
        ((float *) dst->data)[i] = ((const float *) a->data)[i] + ((const float *) b->data)[i] + 1.0f;
    }
}

static void run_graph(layout how, async_device & other) {
    device->uses_host = how == SHARES;
    ggml_backend_ptr dev(ggml_backend_dev_init(&device->dev, nullptr));
    ggml_backend_ptr far(ggml_backend_dev_init(&other.dev, nullptr));
    ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));

    ggml_init_params params = { ggml_tensor_overhead()*256 + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr ctx_dev(ggml_init(params));
    ggml_context_ptr ctx_cpu(ggml_init(params));
    ggml_context_ptr ctx    (ggml_init(params));

    ggml_tensor * x0  = ggml_new_tensor_1d(ctx_dev.get(), GGML_TYPE_F32, N);
    ggml_tensor * own = ggml_new_tensor_1d(ctx_cpu.get(), GGML_TYPE_F32, N);
    ggml_backend_buffer_ptr buf_dev(ggml_backend_alloc_ctx_tensors(ctx_dev.get(), dev.get()));
    ggml_backend_buffer_ptr buf_cpu(ggml_backend_alloc_ctx_tensors(ctx_cpu.get(), cpu.get()));
    const std::vector<float> ones(N, 1.0f);
    for (ggml_tensor * t : { x0, own }) {
        ggml_backend_buffer_set_usage(t->buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        ggml_backend_tensor_set(t, ones.data(), 0, N*sizeof(float));
    }

    ggml_backend_t backends[] = { dev.get(), far.get(), cpu.get() };
    ggml_backend_sched_ptr sched(ggml_backend_sched_new(backends, nullptr, 3, 256, false, false));

    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    const auto expand = [&](ggml_tensor * t, ggml_backend_t where) {
        ggml_build_forward_expand(gf, t);
        ggml_backend_sched_set_tensor_backend(sched.get(), t, where);
        return t;
    };

    float expected = 1.0f;
    ggml_tensor * x    = x0;
    ggml_tensor * cold = nullptr;
    for (int il = 0; il < N_LAYERS; il++) {
        ggml_tensor * a    = expand(ggml_scale(ctx.get(), x, 2.0f), dev.get());
        ggml_tensor * mine = how == OVERWRITES ? ggml_scale_inplace(ctx.get(), a, 0.5f) : ggml_scale(ctx.get(), a, 0.5f);
        expand(mine, dev.get());
        if (how != UNMARKED) {
            mine->flags |= GGML_TIERS_FLAG_OVERLAP;
        }
        if (how == SHARES) {
            expand(ggml_cpy(ctx.get(), mine, own), dev.get());
        }
        ggml_tensor * of_cpu = how == NEEDS_RESULT ? mine : how == NO_INPUTS ? own : a;
        cold = how == SHARES ? ggml_map_custom2(ctx.get(), a, own, add_one_and, 1, nullptr) : ggml_map_custom1(ctx.get(), of_cpu, add_one, 1, nullptr);
        expand(cold, cpu.get());
        x = expand(ggml_add(ctx.get(), mine, cold), how == ELSEWHERE ? far.get() : dev.get());

        const float e_mine = expected*2.0f*0.5f;
        const float e_cpu  = how == NEEDS_RESULT || how == OVERWRITES ? e_mine : how == NO_INPUTS ? 1.0f :
            expected*2.0f + (how == SHARES ? e_mine : 0.0f);
        expected = e_mine + e_cpu + 1.0f;
    }
    CHECK(ggml_backend_sched_alloc_graph(sched.get(), gf));

    n_beside = n_alone = 0;
    for (int i = 0; i < 3; i++) {
        CHECK(ggml_backend_sched_graph_compute_async(sched.get(), gf) == GGML_STATUS_SUCCESS);
        if (how != SHARES) { // the host's memory is free again, whatever devices still do
            memset(cold->data, 0xff, ggml_nbytes(cold));
        }
        ggml_backend_sched_synchronize(sched.get());
        std::vector<float> found(N);
        ggml_backend_tensor_get(x, found.data(), 0, N*sizeof(float));
        for (const float f : found) {
            CHECK(f == expected);
        }
        check_order(how == INDEPENDENT ? N_LAYERS : 0, N_LAYERS);
    }
}

//
// a model
//

static const int N_DECODE = 80; // some exchanges

static std::vector<float> read_model(const char * path, const char * vram, bool overlap, int & n_layers) {
    // copies of experts are left alone with slots
    const async_model loaded = load_model(path, *device, { { "rq.vram", vram }, { "rq.dispatch", "primary" } }, overlap, 4);
    n_layers = llama_model_n_layer(loaded.model.get());

    // a prompt for each of four sequences, which then decode alone, two and four at a time
    std::vector<float> res;
    uint32_t x = 1;
    std::vector<llama_token> last(4);
    std::vector<llama_pos>   pos (4);
    llama_batch batch = llama_batch_init(64, 0, 1);
    const auto add = [&](llama_token token, int seq, bool logits) {
        const int i = batch.n_tokens++;
        batch.token   [i]    = token;
        batch.pos     [i]    = pos[seq]++;
        batch.n_seq_id[i]    = 1;
        batch.seq_id  [i][0] = seq;
        batch.logits  [i]    = logits;
    };
    const auto evaluate = [&]() {
        CHECK(llama_decode(loaded.ctx.get(), batch) == 0);
        for (int i = 0; i < batch.n_tokens; i++) {
            if (batch.logits[i]) {
                const float * logits = llama_get_logits_ith(loaded.ctx.get(), i);
                res.insert(res.end(), logits, logits + loaded.n_vocab);
                last[batch.seq_id[i][0]] = (llama_token) (std::max_element(logits, logits + loaded.n_vocab) - logits);
            }
        }
        batch.n_tokens = 0;
    };
    for (int seq = 0; seq < 4; seq++) {
        for (int i = 0; i < 40; i++) {
            x = x*1664525u + 1013904223u;
            add(300 + (x >> 16) % (100 + 40*seq), seq, i == 39);
        }
        evaluate();
    }
    n_beside = n_alone = 0;
    for (int i = 0; i < N_DECODE; i++) {
        const int n = i < N_DECODE/2 ? 1 : i < 3*N_DECODE/4 ? 2 : 4;
        for (int seq = 0; seq < n; seq++) {
            add(last[seq], seq, true);
        }
        evaluate();
    }
    llama_batch_free(batch);
    return res;
}

static void test_model(const char * path) {
    int n_layers = 0;
    const auto whole = read_model(path, "100%", true, n_layers);
    check_order(0, N_DECODE); // the embeddings
    const auto apart = read_model(path, "50%", false, n_layers);
    check_order(0, N_DECODE*(1 + n_layers));
    const auto both  = read_model(path, "50%", true, n_layers);
    check_order(N_DECODE*n_layers, N_DECODE*(1 + n_layers));
    CHECK(whole == apart && whole == both);
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s order|thread MODEL.gguf\n", argv[0]);
        return 2;
    }
    const bool threaded = std::string(argv[1]) == "thread";
    // with and without events: without, nothing is copied beside the host
    async_device devices[2][2] = {
        { { "first", threaded, false }, { "other", threaded, false } }, { { "first", threaded, true }, { "other", threaded, true } }
    };
    watch_cpu();
    log_warnings();
    for (auto & [first, other] : devices) {
        device = &first;
        for (const layout how : { INDEPENDENT, UNMARKED, NEEDS_RESULT, OVERWRITES, SHARES, ELSEWHERE, NO_INPUTS }) {
            run_graph(how, other);
        }
        test_model(argv[2]);
    }
    return 0;
}
