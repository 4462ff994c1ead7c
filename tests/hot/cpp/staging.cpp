// Experts that go up for prompts by way of pinned memory, and beside what the device computes, to a device that really works beside the host
// (async_device.h): the numbers are the CPU's, the used experts and no others are copied, and no chunk is filled again before it is read. For
// tests/hot and tools/sanitize_hot.sh.
//
//   staging order|thread MODEL.gguf     the device works as late as can be, or on its own thread; exit status 0 if all holds

#include "async_model.h"

#include "ggml-cpu.h"
#include "ggml-tiers.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <utility>

//
// by hand
//

static const int N_EMBD   = 256;
static const int N_ROWS   = 2048;
static const int N_EXPERT = 70; // of Q8_0: more than all chunks
static const int N_LARGE  = 130; // more than twice all chunks

static const size_t CHUNKS = 32*1024*1024; // bytes of all
static_assert((size_t) N_LARGE*N_ROWS*N_EMBD/32*34 > 2*CHUNKS, "they are filled a third time");
static const int N_SMALL  = 64; // rows of small experts, of which more lie apart than a chunk has pieces
static const int N_MANY   = 300;
static const int N_USED   = 4;
static const int N_TOKENS = 33;
static const int N_TAIL   = 512; // bytes behind an expert that are copied with it
static_assert(N_LARGE <= N_USED*N_TOKENS, "each of them is selected");

struct layer {
    std::vector<ggml_type> types;
    std::vector<int32_t>   picks; // the experts that may be selected
    int n_expert = N_EXPERT;      // of each tier
    int n_rows   = N_ROWS;
    std::vector<ggml_tensor *> tiers = {};
    std::vector<int32_t>       ids   = {};
};

static std::vector<layer> make_layers() {
    std::vector<int32_t> all, odd, spread;
    for (int i = 0; i < N_EXPERT; i++) {
        all.push_back(i);
        if (i % 2) {
            odd.push_back(i);
        }
        if (i % 7 < 3) {
            spread.push_back(i);
        }
    }
    const auto q8 = GGML_TYPE_Q8_0;
    const auto q4 = GGML_TYPE_Q4_0;
    std::vector<layer> res;
    for (const auto & picks : { all, odd, std::vector<int32_t>{ 0 }, std::vector<int32_t>{ N_EXPERT - 1 }, std::vector<int32_t>{ -1 }, spread }) {
        res.push_back({ { q8 }, picks });
    }
    // of two tiers, and nothing of the first one
    res.push_back({ { q8, q4 }, { 3, 4, 5, N_EXPERT - 1, N_EXPERT, N_EXPERT + 9, 2*N_EXPERT - 1, -1 } });
    res.push_back({ { q8, q4 }, { N_EXPERT + 1, N_EXPERT + 3 } });
    std::vector<int32_t> apart;
    for (int i = 0; i < N_MANY; i += 2) {
        apart.push_back(i);
    }
    res.push_back({ { q8 }, apart, N_MANY, N_SMALL });
    std::vector<int32_t> large;
    for (int i = 0; i < N_LARGE; i++) {
        large.push_back(i);
    }
    res.push_back({ { q8 }, large, N_LARGE });
    return res;
}

// bytes that are to be copied
static size_t used_bytes(const layer & l) {
    size_t res = 0;
    for (size_t t = 0; t < l.tiers.size(); t++) {
        for (int e = 0; e < l.n_expert; e++) {
            const auto is_used = [&](int i) { return i < l.n_expert && std::count(l.ids.begin(), l.ids.end(), (int) t*l.n_expert + i) > 0; };
            if (is_used(e)) {
                res += l.tiers[t]->nb[2] + (!is_used(e + 1) && e + 1 < l.n_expert ? N_TAIL : 0);
            }
        }
    }
    return res;
}

static void copy_ids(ggml_tensor * dst, int ith, int, void * ids) {
    if (ith == 0) {
        memcpy(dst->data, ids, ggml_nbytes(dst));
    }
}

// of all layers, two times. dev: nullptr for the CPU alone
static std::vector<float> compute(ggml_backend_t dev, std::vector<layer> & layers, ggml_tensor * x) {
    ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    ggml_backend_cpu_set_n_threads(cpu.get(), 2);

    ggml_backend_t backends[] = { dev ? dev : cpu.get(), cpu.get() };
    ggml_backend_sched_ptr sched(ggml_backend_sched_new(dev ? backends : backends + 1, nullptr, dev ? 2 : 1, 256, false, false));
    ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead()*256 + ggml_graph_overhead(), nullptr, true }));
    ggml_cgraph * gf = ggml_new_graph(ctx.get());

    std::vector<ggml_tensor *> outs;
    for (layer & l : layers) {
        ggml_tensor * ids = ggml_custom_4d(ctx.get(), GGML_TYPE_I32, N_USED, N_TOKENS, 1, 1, &x, 1, copy_ids, 1, l.ids.data());
        ggml_tensor * y   = ggml_mul_mat_tiers(ctx.get(), l.tiers.data(), (int) l.tiers.size(), x, ids);
        ggml_set_output(y);
        ggml_build_forward_expand(gf, y);
        ggml_backend_sched_set_tensor_backend(sched.get(), ids, cpu.get());
        ggml_backend_sched_set_tensor_backend(sched.get(), y, backends[0]);
        outs.push_back(y);
    }
    CHECK(ggml_backend_sched_alloc_graph(sched.get(), gf));

    std::vector<float> res;
    for (int i = 0; i < 2; i++) {
        CHECK(ggml_backend_sched_graph_compute(sched.get(), gf) == GGML_STATUS_SUCCESS);
        for (const ggml_tensor * y : outs) {
            res.resize(res.size() + ggml_nelements(y));
            ggml_backend_tensor_get(y, res.data() + res.size() - ggml_nelements(y), 0, ggml_nbytes(y));
        }
    }
    return res;
}

// is_pinned: the weights
static void test_by_hand(async_device & device, bool is_pinned) {
    std::vector<layer> layers = make_layers();
    ggml_context_ptr ctx_x(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    ggml_context_ptr ctx  (ggml_init({ ggml_tensor_overhead()*64, nullptr, true }));
    for (layer & l : layers) {
        for (const ggml_type type : l.types) {
            l.tiers.push_back(ggml_set_name(ggml_new_tensor_3d(ctx.get(), type, N_EMBD, l.n_rows, l.n_expert), "exps"));
        }
    }
    ggml_tensor * x = ggml_new_tensor_3d(ctx_x.get(), GGML_TYPE_F32, N_EMBD, 1, N_TOKENS);

    ggml_backend_buffer_type_t host = ggml_backend_cpu_buffer_type();
    ggml_backend_buffer_ptr buf_x(ggml_backend_alloc_ctx_tensors_from_buft(ctx_x.get(), host));
    ggml_backend_buffer_ptr buf  (ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), is_pinned ? &device.pinned : host));
    ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);

    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < ggml_nelements(x); i++) {
        ((float *) x->data)[i] = normal(rng);
    }
    size_t expected = 0;
    size_t first    = 0; // that the chunks hold when a layer begins
    for (layer & l : layers) {
        for (int i = 0; i < N_USED*N_TOKENS; i++) {
            l.ids.push_back(l.picks[i % l.picks.size()]);
        }
        std::shuffle(l.ids.begin(), l.ids.end(), rng);
        for (size_t t = 0; t < l.tiers.size(); t++) {
            memset(l.tiers[t]->data, 0xff, ggml_nbytes(l.tiers[t])); // no numbers where nothing is read
            std::vector<float> base(N_EMBD*l.n_rows);
            std::generate(base.begin(), base.end(), [&]() { return normal(rng); });
            const size_t row = l.tiers[t]->nb[1];
            std::vector<char> rows(l.tiers[t]->nb[2]);
            ggml_quantize_chunk(l.tiers[t]->type, base.data(), rows.data(), 0, l.n_rows, N_EMBD, nullptr);
            for (int e = 0; e < l.n_expert; e++) { // each has them in another order
                for (int r = 0; r < l.n_rows && std::count(l.ids.begin(), l.ids.end(), (int) t*l.n_expert + e) > 0; r++) {
                    memcpy((char *) l.tiers[t]->data + e*l.tiers[t]->nb[2] + r*row, rows.data() + (r + 13*e) % l.n_rows*row, row);
                }
            }
        }
        expected += used_bytes(l);
        first    += std::min(used_bytes(l), CHUNKS);
    }
    const auto want = compute(nullptr, layers, x);
    for (const auto & [pins, copies] : { std::pair(true, true), std::pair(true, false), std::pair(false, true) }) {
        if (!pins && is_pinned) {
            continue;
        }
        device.pins     = pins;
        device.copies   = copies;
        device.n_pinned = 0;
        device.n_beside = 0;
        ggml_backend_ptr dev(ggml_backend_dev_init(&device.dev, nullptr));
        CHECK(compute(dev.get(), layers, x) == want);
        const bool beside = pins && copies && device.has_events;
        CHECK(device.n_beside == (beside ? 2*(is_pinned ? expected : first) : 0));
        CHECK(device.n_pinned == (is_pinned || (pins && device.has_events) ? 2*expected : 0) - device.n_beside);
    }
}

//
// a model
//

static std::vector<float> read_model(const char * path, async_device & device, llama_load_mode mode = LLAMA_LOAD_MODE_MMAP) {
    const async_model loaded = load_model(path, device, { { "rq.vram", "50%" } }, true, 1, mode);

    // prompts that differ, and a few tokens after each, before which experts are exchanged
    std::vector<float> res;
    std::mt19937 rng(1);
    for (const int n_prompt : { 40, 120, 33 }) {
        for (int i = 0; i < 4; i++) {
            std::vector<llama_token> tokens(i == 0 ? n_prompt : 1);
            std::generate(tokens.begin(), tokens.end(), [&]() { return 300 + (llama_token) (rng() % (2*n_prompt)); });
            CHECK(llama_decode(loaded.ctx.get(), llama_batch_get_one(tokens.data(), (int32_t) tokens.size())) == 0);
            const float * logits = llama_get_logits_ith(loaded.ctx.get(), -1);
            res.insert(res.end(), logits, logits + loaded.n_vocab);
        }
    }
    return res;
}

static void test_model(const char * path, async_device & device) {
    device.offloads = device.pins = device.copies = false;
    const auto want = read_model(path, device);

    struct { bool pins, copies; llama_load_mode mode; } cases[] = { // with LLAMA_LOAD_MODE_NONE the weights are in pinned memory
        { false, true,  LLAMA_LOAD_MODE_MMAP },
        { true,  false, LLAMA_LOAD_MODE_MMAP },
        { true,  false, LLAMA_LOAD_MODE_NONE },
        { true,  true,  LLAMA_LOAD_MODE_MMAP },
        { true,  true,  LLAMA_LOAD_MODE_NONE },
    };
    device.offloads = true;
    for (const auto & c : cases) {
        device.pins     = c.pins;
        device.copies   = c.copies;
        device.n_pinned = device.n_beside = 0;
        CHECK(read_model(path, device, c.mode) == want);
        CHECK((device.n_beside > 0) == (c.pins && c.copies && device.has_events));
        if (device.has_events || c.mode == LLAMA_LOAD_MODE_MMAP) { // else the scheduler's own copies come from there too
            CHECK((device.n_pinned > 0) == (c.pins && device.has_events && !(c.copies && c.mode == LLAMA_LOAD_MODE_NONE)));
        }
    }
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s order|thread MODEL.gguf\n", argv[0]);
        return 2;
    }
    const bool threaded = std::string(argv[1]) == "thread";
    log_warnings();
    for (const bool has_events : { true, false }) {
        async_device device("device", threaded, has_events);
        test_by_hand(device, false);
        test_by_hand(device, true);
        test_model(argv[2], device);
    }
    return 0;
}
