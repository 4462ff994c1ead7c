// Expert weights whose rows come from a small pool per type: quantizing is slow, and rows and experts still differ.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

#define EXPERTS_NAME "experts"

struct weight_pool {
    std::vector<char>  data;   // n rows of the type
    std::vector<float> values; // the same rows, dequantized
    size_t             row_size;
};

const weight_pool & get_weight_pool(ggml_type type, int64_t n_cols);

// row of the pool that a row of an expert is
int64_t pool_row(int64_t expert, int64_t row, int seed);

void fill_experts(ggml_tensor * t, int seed);

// the product of a row and a vector, in double precision
double exact_product(const ggml_tensor * t, int64_t expert, int64_t row, int seed, const double * x);
