// Fuzz target for files with experts in tiers, built and run by tools/fuzz.sh.
//
// The input is a recipe: it is read byte by byte, and every byte that is 0 or missing leaves something as it is in a valid file. So the empty
// input is a valid file, and what is fuzzed is what the patches parse: the rq.* keys, names, types and sizes of tiers, and the maps. All else
// is right, so that nothing is refused before it gets there. What loads is also run, on a prompt and on single tokens.

#include "ggml.h"
#include "gguf.h"
#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

static const int N_LAYER = 2, N_EMBD = 32, N_FF = 32, N_EXPERT = 4, N_USED = 2, N_VOCAB = 32;
static const int64_t MAX_BYTES = 1 << 20; // of one tensor: larger ones test the allocator

struct recipe {
    const uint8_t * data;
    size_t          size;

    uint8_t byte() {
        if (size == 0) {
            return 0;
        }
        size--;
        return *data++;
    }

    int32_t number() {
        uint32_t res = 0;
        for (int i = 0; i < 4; i++) {
            res |= (uint32_t) byte() << 8*i;
        }
        return (int32_t) res;
    }

    // a small difference mostly, any number at times
    int64_t changed(int64_t value) {
        const uint8_t b = byte();
        if (b == 0) {
            return value;
        }
        return b < 240 ? value + b/2*(b % 2 ? 1 : -1) : b < 250 ? (int64_t) b - 243 : number();
    }
};

struct tensor_info {
    std::string          name;
    ggml_type            type;
    std::vector<int64_t> ne;
    std::vector<uint8_t> data;

    int64_t n_bytes() const {
        int64_t n = 1;
        for (size_t i = 1; i < ne.size(); i++) {
            if (ne[i] < 0 || (ne[i] > 0 && n > MAX_BYTES/ne[i])) {
                return -1;
            }
            n *= ne[i];
        }
        const int64_t blck = ggml_blck_size(type);
        if (blck == 0 || ne[0] < 0 || ne[0] > MAX_BYTES || ne[0] % blck != 0) {
            return -1;
        }
        const int64_t row = (int64_t) ggml_type_size(type)*(ne[0]/blck);
        return row > 0 && n > MAX_BYTES/row ? -1 : n*row;
    }
};

// values that no kernel stumbles over
static std::vector<uint8_t> weights(ggml_type type, int64_t n_bytes, uint32_t seed) {
    std::vector<uint8_t> data(n_bytes);
    if (type == GGML_TYPE_F32) {
        for (int64_t i = 0; i + 4 <= n_bytes; i += 4) {
            seed = seed*1664525u + 1013904223u;
            const float x = ((int32_t) (seed >> 16) % 1000)/10000.0f;
            memcpy(&data[i], &x, 4);
        }
    }
    return data;
}

struct file_writer {
    std::vector<uint8_t>     kv;
    std::vector<tensor_info> tensors;
    uint64_t                 n_kv = 0;

    void raw(std::vector<uint8_t> & out, const void * p, size_t n) {
        out.insert(out.end(), (const uint8_t *) p, (const uint8_t *) p + n);
    }
    template <typename T> void put(std::vector<uint8_t> & out, T v) { raw(out, &v, sizeof(v)); }
    void text(std::vector<uint8_t> & out, const std::string & s) {
        put(out, (uint64_t) s.size());
        raw(out, s.data(), s.size());
    }
    template <typename T> void key(const char * name, gguf_type type, T v) {
        text(kv, name);
        put(kv, (uint32_t) type);
        put(kv, v);
        n_kv++;
    }
    void key(const char * name, const std::string & v) {
        text(kv, name);
        put(kv, (uint32_t) GGUF_TYPE_STRING);
        text(kv, v);
        n_kv++;
    }
    void add(const std::string & name, ggml_type type, std::vector<int64_t> ne) {
        tensors.push_back({ name, type, std::move(ne), {} });
        const int64_t n = tensors.back().n_bytes();
        tensors.back().data = weights(type, std::max<int64_t>(n, 0), (uint32_t) tensors.size());
    }

    std::vector<uint8_t> file() {
        std::vector<uint8_t> out;
        raw(out, "GGUF", 4);
        put(out, (uint32_t) 3);
        put(out, (uint64_t) tensors.size());
        put(out, n_kv);
        raw(out, kv.data(), kv.size());
        uint64_t offset = 0;
        for (const auto & t : tensors) {
            text(out, t.name);
            put(out, (uint32_t) t.ne.size());
            for (const int64_t ne : t.ne) {
                put(out, ne);
            }
            put(out, (uint32_t) t.type);
            put(out, offset);
            offset += (t.data.size() + 31)/32*32;
        }
        out.resize((out.size() + 31)/32*32);
        for (const auto & t : tensors) {
            raw(out, t.data.data(), t.data.size());
            out.resize((out.size() + 31)/32*32);
        }
        return out;
    }
};

// the types that rows of 32 can have, and some that they cannot
static const ggml_type TYPES[] = {
    GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q5_0, GGML_TYPE_BF16, GGML_TYPE_Q4_1, GGML_TYPE_Q5_1,
    GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4, GGML_TYPE_Q4_K, GGML_TYPE_I32, GGML_TYPE_I8, GGML_TYPE_I64, GGML_TYPE_Q8_K, GGML_TYPE_F64,
};

static void add_layer(file_writer & w, recipe & r, int il) {
    const std::string p = "blk." + std::to_string(il) + ".";

    for (const char * name : { "attn_norm", "ffn_norm" }) {
        w.add(p + name + ".weight", GGML_TYPE_F32, { N_EMBD });
    }
    for (const char * name : { "attn_q", "attn_k", "attn_v", "attn_output" }) {
        w.add(p + name + ".weight", GGML_TYPE_F32, { N_EMBD, N_EMBD });
    }
    w.add(p + "ffn_gate_inp.weight", GGML_TYPE_F32, { N_EMBD, N_EXPERT });

    // what a layer is made of: tiers, copies of the first experts, whether it has a map
    const int  n_tiers  = 1 + (r.byte() + 1) % 8;
    const int  n_copies = r.byte() % (N_EXPERT + 1);
    const bool has_map  = r.byte() % 8 != 7 && (n_tiers > 1 || n_copies > 0);
    const int  n_phys   = N_EXPERT + n_copies;

    const uint8_t shape = r.byte(); // 1: merged gate_up, 2 to 5: one of the matrices is not in tiers
    const char *  merged[]   = { "gate_up", "down" };
    const char *  separate[] = { "gate", "up", "down" };
    const int     n_matrices = shape == 1 ? 2 : 3;

    for (int m = 0; m < n_matrices; m++) {
        const std::string name = (shape == 1 ? merged : separate)[m];
        const bool        down = name == "down";
        const int64_t     ne0  = down ? N_FF : N_EMBD;
        const int64_t     ne1  = down ? N_EMBD : name == "gate_up" ? 2*N_FF : N_FF;

        if (shape == 2 + m) {
            w.add(p + "ffn_" + name + "_exps.weight", GGML_TYPE_Q8_0, { ne0, ne1, N_EXPERT });
            continue;
        }
        for (int t = 0, first = 0; t < n_tiers; t++) {
            const int n = t == n_tiers - 1 ? n_phys - first : std::min(std::max(1, n_phys/n_tiers), n_phys - first);
            first += n;

            const uint8_t what = r.byte();
            if (what == 1) {
                continue; // missing
            }
            const std::string number = std::to_string(what == 2 ? r.changed(t) : t);
            const ggml_type   type   = TYPES[what >= 3 && what < 35 ? what % 16 : t % 10];

            std::vector<int64_t> ne = { ne0, ne1, n };
            if (what >= 128) {
                ne[what % 3] = r.changed(ne[what % 3]);
                if (what >= 240) {
                    ne.resize(what % 4 + 1, 1);
                }
            }
            w.add(p + "ffn_" + name + "_exps." + number + (what == 255 ? ".bias" : ".weight"), type, ne);
        }
    }

    if (!has_map) {
        return;
    }
    const uint8_t what = r.byte();

    std::vector<int64_t> ne = { 2 + (n_copies > 0), N_EXPERT, 2 };
    if (what == 2) {
        ne[0]++;
    }
    std::vector<int32_t> table;
    for (int g = 0; g < 2; g++) {
        for (int e = 0; e < N_EXPERT; e++) {
            const int n = 1 + (e < n_copies);
            for (int64_t i = 0; i < ne[0]; i++) {
                const int32_t right = i == 0 ? n : i > n ? -1 : i == 1 ? e : N_EXPERT + e;
                table.push_back((int32_t) r.changed(right));
            }
        }
    }
    if (what >= 3 && what < 16) {
        ne[what % 3] = r.changed(ne[what % 3]);
    } else if (what == 16) {
        ne.pop_back();
    }
    w.add(p + "ffn_log2phy", what == 1 ? TYPES[r.byte() % 16] : GGML_TYPE_I32, ne);
    auto & data = w.tensors.back().data;
    std::copy_n((const uint8_t *) table.data(), std::min(data.size(), table.size()*sizeof(int32_t)), data.begin());
}

static std::vector<uint8_t> make_file(recipe & r) {
    file_writer w;

    w.key("general.architecture", std::string("llama"));
    for (const auto & [name, value] : std::vector<std::pair<const char *, uint32_t>> {
            { "llama.block_count", N_LAYER }, { "llama.context_length", 64 }, { "llama.embedding_length", N_EMBD },
            { "llama.feed_forward_length", N_FF }, { "llama.attention.head_count", 2 }, { "llama.expert_count", N_EXPERT },
            { "llama.expert_used_count", N_USED }, { "llama.rope.dimension_count", N_EMBD/2 }, { "llama.vocab_size", N_VOCAB } }) {
        w.key(name, GGUF_TYPE_UINT32, value);
    }
    w.key("llama.attention.layer_norm_rms_epsilon", GGUF_TYPE_FLOAT32, 1e-5f);
    w.key("tokenizer.ggml.model", std::string("no_vocab"));

    const uint8_t keys = r.byte();
    if (keys == 1) {
        w.key("rq.format_version", std::string("1"));
    } else if (keys == 2) {
        w.key("rq.format_version", GGUF_TYPE_INT64, (int64_t) r.number());
    } else if (keys != 3) {
        w.key("rq.format_version", GGUF_TYPE_UINT32, (uint32_t) (keys == 4 ? r.number() : 1));
    }
    if (keys >= 8) {
        const std::string names[] = { "balanced", "primary", "", std::string("bal\0anced", 9), "random" };
        w.key("rq.dispatch", names[keys % 5]);
        w.key("rq.dispatch_block", keys % 3 ? GGUF_TYPE_UINT32 : GGUF_TYPE_INT32, (uint32_t) r.changed(16));
    }

    w.add("token_embd.weight", GGML_TYPE_F32, { N_EMBD, N_VOCAB });
    w.add("output_norm.weight", GGML_TYPE_F32, { N_EMBD });
    w.add("output.weight", GGML_TYPE_F32, { N_EMBD, N_VOCAB });
    for (int il = 0; il < N_LAYER; il++) {
        add_layer(w, r, il);
    }
    return w.file();
}

static void run(llama_model * model) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 64;
    params.n_batch         = 64;
    params.n_threads       = 1;
    params.n_threads_batch = 1;

    llama_context * ctx = llama_init_from_model(model, params);
    for (int n_tokens : { 19, 1, 3 }) {
        std::vector<llama_token> tokens(n_tokens);
        for (int i = 0; i < n_tokens; i++) {
            tokens[i] = (7*i + n_tokens) % N_VOCAB;
        }
        if (ctx && llama_decode(ctx, llama_batch_get_one(tokens.data(), n_tokens)) != 0) {
            abort(); // a file that loads must run
        }
    }
    llama_free(ctx);
}

static bool load(const std::vector<uint8_t> & data) {
    const int fd = memfd_create("model", 0);
    if (fd < 0 || write(fd, data.data(), data.size()) != (ssize_t) data.size() || lseek(fd, 0, SEEK_SET) != 0) {
        abort();
    }
    FILE * file = fdopen(fd, "rb");

    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;

    llama_model * model = llama_model_load_from_file_ptr(file, params);
    if (model) {
        run(model);
        llama_model_free(model);
    }
    fclose(file);

    return model != nullptr;
}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_backend_init();
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (getenv("FUZZ_VERBOSE") && level >= GGML_LOG_LEVEL_WARN) {
            fputs(text, stderr);
        }
    }, nullptr);

    recipe nothing = { nullptr, 0 };
    if (!load(make_file(nothing))) {
        fprintf(stderr, "the valid file does not load: the target is of no use\n");
        abort();
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    recipe r = { data, size };

    load(make_file(r));

    return 0;
}
