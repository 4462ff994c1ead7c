#pragma once

// A model on a device that really works beside the host (async_device.h), and what programs with one share.

#include "async_device.h"

#include "llama-cpp.h"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "line %d: %s\n", __LINE__, #x); exit(1); } } while (0)

struct async_model {
    llama_model_ptr   model;
    llama_context_ptr ctx;
    int               n_vocab;
};

// texts: as --override-kv; nothing is measured
inline async_model load_model(
        const char * path, async_device & device, std::vector<std::pair<const char *, const char *>> texts, bool overlap, int n_seq,
        llama_load_mode mode = LLAMA_LOAD_MODE_AUTO) {
    texts.insert(texts.end(), { { "rq.vram_layout", "slots" }, { "rq.vram_speeds", "ram=5e10 vram=5e11 handover=0" } });

    std::vector<llama_model_kv_override> overrides(texts.size() + 2);
    for (size_t i = 0; i < texts.size(); i++) {
        overrides[i].tag = LLAMA_KV_OVERRIDE_TYPE_STR;
        snprintf(overrides[i].key,     sizeof(overrides[i].key),     "%s", texts[i].first);
        snprintf(overrides[i].val_str, sizeof(overrides[i].val_str), "%s", texts[i].second);
    }
    llama_model_kv_override & last = overrides[texts.size()];
    last.tag      = LLAMA_KV_OVERRIDE_TYPE_BOOL;
    last.val_bool = overlap;
    snprintf(last.key, sizeof(last.key), "rq.vram_overlap");

    ggml_backend_dev_t devices[] = { &device.dev, nullptr };

    llama_model_params mparams = llama_model_default_params();
    mparams.devices         = devices;
    mparams.n_gpu_layers    = 999;
    mparams.kv_overrides    = overrides.data();
    mparams.load_mode       = mode;
    mparams.use_extra_bufts = false; // repacked weights are multiplied in another order

    async_model res;
    res.model.reset(llama_model_load_from_file(path, mparams));
    CHECK(res.model);

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = 1024;
    cparams.n_seq_max       = n_seq;
    cparams.n_threads       = 2;
    cparams.n_threads_batch = 2;
    res.ctx.reset(llama_init_from_model(res.model.get(), cparams));
    CHECK(res.ctx);
    res.n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(res.model.get()));
    return res;
}

inline void log_warnings() {
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) {
            fputs(text, stderr);
        }
    }, nullptr);
}
