#include "graphs.h"

#include "ggml-impl.h"
#include "ggml-tiers.h"
#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <stdexcept>

#include <strings.h>

int case_spec::num(const std::string & key, int otherwise) const {
    const auto it = values.find(key);
    return it == values.end() ? otherwise : atoi(it->second.c_str());
}

std::string case_spec::str(const std::string & key, const std::string & otherwise) const {
    const auto it = values.find(key);
    return it == values.end() ? otherwise : it->second;
}

static constexpr size_t CONTEXT_SIZE = 256u*1024*1024;
static constexpr float  CLAMP        = 6.103515625e-5f;

// a matrix in tiers
struct experts {
    std::vector<ggml_tensor *> tiers;
    int                        seed;

    int64_t n_phys() const {
        int64_t n = 0;
        for (const ggml_tensor * t : tiers) {
            n += t->ne[2];
        }
        return n;
    }

    double product(int64_t phys, int64_t row, const double * x) const {
        size_t t = 0;
        while (phys >= tiers[t]->ne[2]) {
            phys -= tiers[t++]->ne[2];
        }
        return exact_product(tiers[t], phys, row, seed + (int) t, x);
    }
};

static ggml_type type_by_name(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * n = ggml_type_name((ggml_type) i);
        if (n && strcasecmp(name.c_str(), n) == 0) {
            return (ggml_type) i;
        }
    }
    throw std::runtime_error("no type " + name);
}

// "q8_0:4+q4_K:3"
static experts new_experts(ggml_context * ctx, const std::string & spec, int64_t n_cols, int64_t n_rows, int seed) {
    experts res = { {}, seed };
    size_t start = 0;
    while (start < spec.size()) {
        const size_t end   = std::min(spec.find('+', start), spec.size());
        const size_t colon = spec.find(':', start);
        const ggml_type type = type_by_name(spec.substr(start, colon - start));
        ggml_tensor * t = ggml_new_tensor_3d(ctx, type, n_cols, n_rows, atoi(spec.c_str() + colon + 1));
        fill_experts(t, seed + (int) res.tiers.size());
        res.tiers.push_back(t);
        start = end + 1;
    }
    return res;
}

static void fill_uniform(ggml_tensor * t, std::mt19937 & rng, float scale) {
    std::uniform_real_distribution<float> uniform(-scale, scale);
    for (int64_t i = 0; i < ggml_nelements(t); i++) {
        ((float *) t->data)[i] = uniform(rng);
    }
}

// ids of [first, first + n), different ones for a token; some are -1. as a view into longer rows, as top-k leaves them
static ggml_tensor * new_ids(ggml_context * ctx, int n_used, int n_tokens, int first, int n, int n_skip, bool view, std::mt19937 & rng) {
    const int n_row = view ? n_used + 3 : n_used;
    ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_row, n_tokens);
    std::vector<int32_t> perm(n);
    for (int i = 0; i < n; i++) {
        perm[i] = first + i;
    }
    for (int t = 0; t < n_tokens; t++) {
        // every third token selects what the one before does: some experts get many rows
        if (t % 3 != 2) {
            std::shuffle(perm.begin(), perm.end(), rng);
        }
        int32_t * row = (int32_t *) ids->data + t*n_row;
        std::fill(row, row + n_row, 0x7FFFFFF);
        for (int i = 0; i < n_used; i++) {
            row[i] = (i + t) % n_used < n_skip ? -1 : perm[i];
        }
    }
    return view ? ggml_view_2d(ctx, ids, n_used, n_tokens, ids->nb[1], 0) : ids;
}

static int32_t id_at(const ggml_tensor * ids, int64_t slot, int64_t token) {
    return *(const int32_t *) ((const char *) ids->data + token*ids->nb[1] + slot*ids->nb[0]);
}

static std::vector<double> doubles(const ggml_tensor * b, int64_t slot, int64_t token) {
    const float * x = (const float *) ((const char *) b->data + (slot % b->ne[1])*b->nb[1] + token*b->nb[2]);
    return { x, x + b->ne[0] };
}

static void set_precision(ggml_tensor * t, const case_spec & spec) {
    if (spec.num("prec", 0)) {
        ggml_set_op_params_i32(t, 3, GGML_PREC_F32);
    }
}

static ggml_tensor * multiply(ggml_context * ctx, const experts & w, ggml_tensor * b, ggml_tensor * ids, const case_spec & spec) {
    std::vector<ggml_tensor *> tiers = w.tiers;
    ggml_tensor * res = spec.str("op", "") == "id"
        ? ggml_mul_mat_id(ctx, tiers[0], b, ids)
        : ggml_mul_mat_tiers(ctx, tiers.data(), (int) tiers.size(), b, ids);
    set_precision(res, spec);
    return res;
}

static std::vector<double> exact_multiply(const experts & w, const ggml_tensor * b, const ggml_tensor * ids, int64_t n_rows) {
    std::vector<double> res(n_rows*ids->ne[0]*ids->ne[1]);
    for (int64_t t = 0; t < ids->ne[1]; t++) {
        for (int64_t s = 0; s < ids->ne[0]; s++) {
            const int32_t id = id_at(ids, s, t);
            if (id < 0) {
                continue;
            }
            const std::vector<double> x = doubles(b, s, t);
            for (int64_t r = 0; r < n_rows; r++) {
                res[(t*ids->ne[0] + s)*n_rows + r] = w.product(id, r, x.data());
            }
        }
    }
    return res;
}

//
// MUL_MAT_ID, MUL_MAT_TIERS, and two of them with GLU
//

static double swiglu(double gate, double up) {
    return gate/(1 + exp(-gate))*up;
}

static ggml_tensor * add_bias(ggml_context * ctx, ggml_tensor * x, int64_t n_rows, int64_t n_expert, ggml_tensor * ids, std::mt19937 & rng) {
    ggml_tensor * bias = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_rows, n_expert);
    fill_uniform(bias, rng, 1);
    return ggml_add_id(ctx, x, bias, ids);
}

static void build_multiplication(graph & g, const case_spec & spec) {
    ggml_context * ctx = g.ctx.get();

    const int  k        = spec.num("k", 256);
    const int  m        = spec.num("m", 64);
    const int  n_used   = spec.num("used", 2);
    const int  n_tokens = spec.num("tokens", 1);
    const int  only     = spec.num("only", -1);
    const bool pair     = spec.str("op", "") == "pair";
    const bool bias     = spec.num("bias", 0);

    std::mt19937 rng(spec.num("seed", 1));

    const experts up   = new_experts(ctx, spec.str("types", ""), k, m, 1);
    const experts gate = pair ? new_experts(ctx, spec.str("types", ""), k, m, 2) : up;

    int first = 0;
    for (int t = 0; t < only; t++) {
        first += up.tiers[t]->ne[2];
    }
    const int n = only < 0 ? up.n_phys() : up.tiers[only]->ne[2];

    ggml_tensor * b   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, spec.num("bcast", 0) ? 1 : n_used, n_tokens);
    ggml_tensor * ids = new_ids(ctx, n_used, n_tokens, first, n, spec.num("skip", 0), spec.num("view", 1), rng);
    fill_uniform(b, rng, (float) spec.num("scale", 1));

    g.out = multiply(ctx, up, b, ids, spec);
    if (!pair) {
        g.exact = exact_multiply(up, b, ids, m);
        return;
    }

    ggml_tensor * logical = new_ids(ctx, n_used, n_tokens, 0, n, 0, false, rng);

    ggml_tensor * x = g.out;
    if (bias) {
        x = add_bias(ctx, x, m, up.n_phys(), logical, rng);
    }
    ggml_tensor * ids_gate = spec.num("other_ids", 0) ? new_ids(ctx, n_used, n_tokens, first, n, 0, false, rng) : ids;
    ggml_tensor * y = multiply(ctx, gate, b, ids_gate, spec);
    if (bias) {
        y = add_bias(ctx, y, m, up.n_phys(), logical, rng);
    }
    g.out = ggml_swiglu_split(ctx, y, x);

    g.exact = exact_multiply(up, b, ids, m);
    const std::vector<double> exact_gate = exact_multiply(gate, b, ids_gate, m);
    for (int64_t i = 0; i < (int64_t) g.exact.size(); i++) {
        double xv = g.exact[i];
        double yv = exact_gate[i];
        if (bias) {
            const int64_t row = i/m;
            const int64_t at  = id_at(logical, row % n_used, row/n_used)*m + i % m;
            xv += ((const float *) x->src[1]->data)[at];
            yv += ((const float *) y->src[1]->data)[at];
        }
        g.exact[i] = swiglu(yv, xv);
    }
}

//
// EXPERT_REMAP
//

// 1 to n_slots instances per expert, numbered at random; some are held elsewhere (-1) if asked for
static void fill_map(ggml_tensor * map, bool elsewhere, bool full, std::mt19937 & rng) {
    const int64_t n_slots  = map->ne[0] - 1;
    const int64_t n_expert = map->ne[1];

    std::vector<int32_t> n(n_expert);
    int32_t n_phys = 0;
    for (int64_t e = 0; e < n_expert; e++) {
        n[e] = full ? n_slots : 1 + rng() % n_slots;
        n_phys += n[e];
    }
    for (int64_t im = 0; im < map->ne[2]; im++) {
        std::vector<int32_t> phys(n_phys);
        for (int32_t i = 0; i < n_phys; i++) {
            phys[i] = i;
        }
        std::shuffle(phys.begin(), phys.end(), rng);
        int32_t next = 0;
        for (int64_t e = 0; e < n_expert; e++) {
            int32_t * row = (int32_t *) map->data + (im*n_expert + e)*map->ne[0];
            row[0] = n[e];
            for (int64_t i = 0; i < n_slots; i++) {
                row[1 + i] = i >= n[e] ? -1 : phys[next++];
                if (elsewhere && (e + i) % 7 == 6) {
                    row[1 + i] = -1;
                }
            }
        }
    }
}

// "2,0,5,..." in the order of the tensor; false if there is none
static bool read_map(ggml_tensor * map, const std::string & values) {
    std::istringstream words(values);
    std::string word;
    int64_t n = 0;
    while (std::getline(words, word, ',') && n < ggml_nelements(map)) {
        ((int32_t *) map->data)[n++] = atoi(word.c_str());
    }
    if (n > 0 && n < ggml_nelements(map)) {
        throw std::runtime_error("the map is too short");
    }
    return n > 0;
}

static void check_map(const ggml_tensor * map, int64_t im, int64_t n_phys) {
    for (int64_t e = 0; e < map->ne[1]; e++) {
        const int32_t * row = (const int32_t *) map->data + (im*map->ne[1] + e)*map->ne[0];
        for (int32_t i = 1; i <= row[0]; i++) {
            if (row[i] < 0 || row[i] >= n_phys) {
                throw std::runtime_error("the map points to an expert that no tier has");
            }
        }
    }
}

static void build_remap(graph & g, const case_spec & spec) {
    ggml_context * ctx = g.ctx.get();
    std::mt19937 rng(spec.num("seed", 1));

    const int n_expert = spec.num("experts", 8);

    ggml_tensor * ids = new_ids(ctx, spec.num("used", 2), spec.num("tokens", 1), 0, n_expert, 0, spec.num("view", 1), rng);
    ggml_tensor * map = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 1 + spec.num("slots", 3), n_expert, 2);
    fill_map(map, true, false, rng);

    g.out = ggml_expert_remap(ctx, ids, map, spec.num("block", 16));
    g.checked.push_back(g.out);
}

//
// a MoE layer, as llama.cpp builds it: routing, remap, gate, up, GLU, down, weighted sum
//

static void build_moe(graph & g, const case_spec & spec) {
    ggml_context * ctx = g.ctx.get();
    std::mt19937 rng(spec.num("seed", 1));

    const int  n_expert = spec.num("experts", 8);
    const int  n_used   = spec.num("used", 2);
    const int  n_tokens = spec.num("tokens", 1);
    const int  n_embd   = spec.num("embd", 256);
    const int  n_ff     = spec.num("ff", 256);
    const int  n_slots  = spec.num("slots", 1);
    const int  block    = spec.num("block", 16);
    const bool norm     = spec.num("norm", 0);

    const experts gate = new_experts(ctx, spec.str("types", ""),      n_embd, n_ff,   1);
    const experts up   = new_experts(ctx, spec.str("types", ""),      n_embd, n_ff,   2);
    const experts down = new_experts(ctx, spec.str("types_down", ""), n_ff,   n_embd, 3);

    ggml_tensor * logits = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_expert, n_tokens);
    ggml_tensor * input  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, n_tokens);
    ggml_tensor * map    = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 1 + n_slots, n_expert, 2);
    fill_uniform(logits, rng, 3);
    fill_uniform(input,  rng, 1);
    if (!read_map(map, spec.str("map", ""))) {
        fill_map(map, false, true, rng);
    }
    check_map(map, 0, gate.n_phys());
    check_map(map, 1, down.n_phys());

    ggml_tensor * probs    = ggml_soft_max(ctx, logits);
    ggml_tensor * selected = ggml_argsort_top_k(ctx, probs, n_used);
    ggml_tensor * weights  = ggml_get_rows(ctx, ggml_reshape_3d(ctx, probs, 1, n_expert, n_tokens), selected);
    if (norm) {
        weights = ggml_reshape_2d(ctx, weights, n_used, n_tokens);
        ggml_tensor * sum = ggml_clamp(ctx, ggml_sum_rows(ctx, weights), CLAMP, INFINITY);
        weights = ggml_reshape_3d(ctx, ggml_div(ctx, weights, sum), 1, n_used, n_tokens);
    }
    ggml_build_forward_expand(g.gf, weights);

    ggml_tensor * phys = ggml_expert_remap(ctx, selected, map, block);
    ggml_tensor * ids[2];
    for (int i = 0; i < 2; i++) {
        ids[i] = ggml_view_2d(ctx, phys, n_used, n_tokens, phys->nb[1], i*phys->nb[2]);
    }
    g.checked.push_back(phys);

    ggml_tensor * b = ggml_reshape_3d(ctx, input, n_embd, 1, n_tokens);
    ggml_tensor * x = multiply(ctx, up, b, ids[0], spec);
    ggml_build_forward_expand(g.gf, x);
    ggml_tensor * y = multiply(ctx, gate, b, ids[0], spec);
    ggml_tensor * h = ggml_swiglu_split(ctx, y, x);
    ggml_tensor * z = ggml_mul(ctx, multiply(ctx, down, h, ids[1], spec), weights);
    ggml_build_forward_expand(g.gf, z);

    ggml_tensor * parts[64];
    for (int i = 0; i < n_used; i++) {
        parts[i] = ggml_view_2d(ctx, z, n_embd, n_tokens, z->nb[2], i*z->nb[1]);
        ggml_build_forward_expand(g.gf, parts[i]);
    }
    g.out = parts[0];
    for (int i = 1; i < n_used; i++) {
        g.out = ggml_add(ctx, g.out, parts[i]);
        ggml_build_forward_expand(g.gf, g.out);
    }
    if (n_used == 1) {
        g.out = ggml_cont(ctx, g.out);
    }

    // the same in double precision; the token's turn among those of its expert decides on the copy
    g.exact.assign((size_t) n_embd*n_tokens, 0.0);
    std::vector<int> rank(n_expert, 0);
    for (int t = 0; t < n_tokens; t++) {
        const float * l = (const float *) logits->data + t*n_expert;
        std::vector<int> order(n_expert);
        std::vector<double> p(n_expert);
        double sum = 0;
        for (int e = 0; e < n_expert; e++) {
            order[e] = e;
            p[e]     = exp((double) l[e]);
            sum     += p[e];
        }
        std::sort(order.begin(), order.end(), [l](int i, int j) { return l[i] > l[j]; });
        double sum_used = 0;
        for (int i = 0; i < n_used; i++) {
            sum_used += p[order[i]]/sum;
        }
        const float * in = (const float *) input->data + t*n_embd;
        const std::vector<double> xin(in, in + n_embd);
        for (int i = 0; i < n_used; i++) {
            const int e    = order[i];
            const int turn = block > 0 ? rank[e]++/block : 0;
            int32_t id[2];
            for (int im = 0; im < 2; im++) {
                const int32_t * row = (const int32_t *) map->data + (im*n_expert + e)*(1 + n_slots);
                id[im] = row[1 + turn % row[0]];
            }
            std::vector<double> hidden(n_ff);
            for (int r = 0; r < n_ff; r++) {
                hidden[r] = swiglu(gate.product(id[0], r, xin.data()), up.product(id[0], r, xin.data()));
            }
            const double w = p[e]/sum/(norm ? std::max(sum_used, (double) CLAMP) : 1);
            for (int r = 0; r < n_embd; r++) {
                g.exact[(size_t) t*n_embd + r] += w*down.product(id[1], r, hidden.data());
            }
        }
    }
}

graph build_graph(const case_spec & spec) {
    graph g;
    g.ctx.reset(ggml_init({ CONTEXT_SIZE, nullptr, false }));
    g.gf = ggml_new_graph(g.ctx.get());

    const std::string op = spec.str("op", "");
    if (op == "id" || op == "tiers" || op == "pair") {
        build_multiplication(g, spec);
    } else if (op == "remap") {
        build_remap(g, spec);
    } else if (op == "moe") {
        build_moe(g, spec);
    } else {
        throw std::runtime_error("no op '" + op + "'");
    }

    ggml_set_output(g.out);
    ggml_build_forward_expand(g.gf, g.out);
    return g;
}
