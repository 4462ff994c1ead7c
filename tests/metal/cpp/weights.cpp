#include "weights.h"

#include <cstring>
#include <map>
#include <random>

static constexpr int64_t N_ROWS = 61;

// random blocks with a small factor, of the types that take long to quantize; every pattern of their other bits is valid
static bool fill_with_blocks(ggml_type type, std::vector<char> & data, std::mt19937 & rng) {
    switch (type) {
        case GGML_TYPE_IQ1_S:
        case GGML_TYPE_IQ1_M:
        case GGML_TYPE_IQ2_XXS:
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_S:
        case GGML_TYPE_IQ3_XXS:
        case GGML_TYPE_IQ3_S:
            break;
        default:
            return false;
    }
    const uint16_t factor = 0x2800; // 0.03 in half precision
    for (char & c : data) {
        c = (char) rng();
    }
    for (size_t i = 0; i < data.size(); i += ggml_type_size(type)) {
        if (type != GGML_TYPE_IQ1_M) {
            memcpy(&data[i], &factor, sizeof(factor));
            continue;
        }
        // four bits of the factor are the high bits of each of the last four words
        for (int k = 0; k < 4; k++) {
            char & high = data[i + ggml_type_size(type) - 8 + 2*k + 1];
            high = (char) ((high & 0x0F) | (factor >> 4*k & 0xF) << 4);
        }
    }
    return true;
}

const weight_pool & get_weight_pool(ggml_type type, int64_t n_cols) {
    static std::map<std::pair<ggml_type, int64_t>, weight_pool> pools;

    weight_pool & pool = pools[{ type, n_cols }];
    if (!pool.data.empty()) {
        return pool;
    }

    std::mt19937 rng(1 + type);
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<float> weights(N_ROWS*n_cols);
    for (float & w : weights) {
        w = uniform(rng);
    }
    const std::vector<float> importance(n_cols, 1.0f);

    pool.row_size = ggml_row_size(type, n_cols);
    pool.data.resize(N_ROWS*pool.row_size);
    pool.values.resize(weights.size());
    if (type == GGML_TYPE_F32) {
        memcpy(pool.data.data(), weights.data(), pool.data.size());
        pool.values = weights;
    } else {
        if (!fill_with_blocks(type, pool.data, rng)) {
            ggml_quantize_chunk(type, weights.data(), pool.data.data(), 0, N_ROWS, n_cols, importance.data());
        }
        ggml_get_type_traits(type)->to_float(pool.data.data(), pool.values.data(), weights.size());
    }
    return pool;
}

int64_t pool_row(int64_t expert, int64_t row, int seed) {
    return (expert*17 + row*5 + expert*row + seed*29) % N_ROWS;
}

void fill_experts(ggml_tensor * t, int seed) {
    ggml_set_name(t, EXPERTS_NAME);
    const weight_pool & pool = get_weight_pool(t->type, t->ne[0]);
    for (int64_t e = 0; e < t->ne[2]; e++) {
        for (int64_t r = 0; r < t->ne[1]; r++) {
            memcpy((char *) t->data + e*t->nb[2] + r*t->nb[1], pool.data.data() + pool_row(e, r, seed)*pool.row_size, pool.row_size);
        }
    }
}

double exact_product(const ggml_tensor * t, int64_t expert, int64_t row, int seed, const double * x) {
    const weight_pool & pool = get_weight_pool(t->type, t->ne[0]);
    const float * w = pool.values.data() + pool_row(expert, row, seed)*t->ne[0];
    double sum = 0;
    for (int64_t i = 0; i < t->ne[0]; i++) {
        sum += w[i]*x[i];
    }
    return sum;
}
