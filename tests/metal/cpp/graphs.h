// A graph of a case: built and computed by ggml-cpu, then run by the Metal host code and kernels on the emulated device.
#pragma once

#include "ggml.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

// a line of the input: key=value ...
struct case_spec {
    std::map<std::string, std::string> values;

    int         num(const std::string & key, int otherwise) const;
    std::string str(const std::string & key, const std::string & otherwise) const;
};

struct context_deleter {
    void operator()(ggml_context * ctx) { ggml_free(ctx); }
};

struct graph {
    std::unique_ptr<ggml_context, context_deleter> ctx;
    ggml_cgraph                * gf = nullptr;
    ggml_tensor                * out = nullptr;
    std::vector<ggml_tensor *>   checked; // results that are compared bit by bit (ids)
    std::vector<double>          exact;   // of out; empty where the values of the CPU are exact
};

// inputs are set; the graph is not computed
graph build_graph(const case_spec & spec);
