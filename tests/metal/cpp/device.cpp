// Stand-in for ggml-metal-device.m and the Metal framework: the host code of ggml-metal encodes into it as it is.
//
// Dispatches are collected and run at a barrier (or at the end of encoding), in the order of the schedule: what needs a barrier and has
// none fails. What Metal or its validation layer would refuse, this refuses.
#include "device.h"

#include "ggml-metal-tiers.h"
#include "ggml.h"
#include "kernels.h"

#include <cstring>
#include <map>
#include <memory>

mtl_options             mtl_device_options;
std::vector<mtl_record> mtl_device_records;

std::vector<const mtl_library *> & mtl_libraries() {
    static std::vector<const mtl_library *> libraries;
    return libraries;
}

struct constant_value {
    int               value;
    mtl_constant_type type;
};

struct ggml_metal_cv {
    std::map<int, constant_value> values;
};

struct ggml_metal_pipeline {
    const mtl_library *           library;
    const mtl_kernel *            kernel;
    std::map<int, constant_value> constants;
};

struct ggml_metal_library {
    std::map<std::string, ggml_metal_pipeline *> pipelines;
};

struct ggml_metal_encoder {
    bool                      concurrent;
    ggml_metal_pipeline *     pipeline = nullptr;
    mtl_arguments             args;
    size_t                    shared_size = 0;
    bool                      has_shared  = false;
    int                       n_barriers  = 0;
    std::vector<mtl_dispatch> dispatches;
};

static constexpr size_t MOST_SHARED  = 32768;
static constexpr size_t MOST_BYTES   = 4096;
static constexpr int    MOST_THREADS = 1024;
static constexpr int    NEVER_SET    = 0x5A5A;

static ggml_metal_library      the_library;
static ggml_metal_device_props the_props;

static void run(ggml_metal_encoder * enc) {
    mtl_run(enc->dispatches, mtl_device_options.schedule);
    enc->dispatches.clear();
}

static void select_constants(const ggml_metal_pipeline & pipeline) {
    for (const mtl_constant & c : pipeline.library->constants) {
        const auto it = pipeline.constants.find(c.index);
        c.set(it == pipeline.constants.end() ? NEVER_SET : it->second.value);
    }
}

static void check_constants(const mtl_library & library, const char * kernel, const std::map<int, constant_value> & values) {
    for (const auto & [index, value] : values) {
        const mtl_constant * found = nullptr;
        for (const mtl_constant & c : library.constants) {
            found = c.index == index ? &c : found;
        }
        if (!found) {
            mtl_fail("%s: %s has no function constant %d", kernel, library.file, index);
        }
        if (found->type != value.type) {
            mtl_fail("%s: function constant %s is set as another type than it has", kernel, found->name);
        }
    }
}

extern "C" {

//
// constants and pipelines
//

ggml_metal_cv_t ggml_metal_cv_init(void) { return new ggml_metal_cv; }

void ggml_metal_cv_free(ggml_metal_cv_t cv) { delete cv; }

void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t value, int32_t idx) { cv->values[idx] = { value, MTL_INT16 }; }
void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t idx) { cv->values[idx] = { value, MTL_INT32 }; }
void ggml_metal_cv_set_bool (ggml_metal_cv_t cv, bool    value, int32_t idx) { cv->values[idx] = { value, MTL_BOOL  }; }

ggml_metal_pipeline_t ggml_metal_pipeline_init(void) { return new ggml_metal_pipeline; }

void ggml_metal_pipeline_free(ggml_metal_pipeline_t pipeline) { delete pipeline; }

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return MOST_THREADS; }

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params res = {};
    const auto it = lib->pipelines.find(name);
    if (it != lib->pipelines.end()) {
        res.pipeline = it->second;
    }
    return res;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base, const char * name, ggml_metal_cv_t cv) {
    ggml_metal_pipeline_with_params res = {};
    for (const mtl_library * library : mtl_libraries()) {
        for (const mtl_kernel & kernel : library->kernels) {
            if (strcmp(kernel.name, base) != 0) {
                continue;
            }
            if (res.pipeline) {
                mtl_fail("two kernels have the name %s", base);
            }
            res.pipeline = new ggml_metal_pipeline { library, &kernel, cv ? cv->values : std::map<int, constant_value>() };
            check_constants(*library, base, res.pipeline->constants);
        }
    }
    if (!res.pipeline) {
        mtl_fail("the host asks for kernel %s, which no compiled source has", base);
    }
    lib->pipelines[name] = res.pipeline;
    return res;
}

//
// device
//

ggml_metal_device_t  ggml_metal_library_get_device(ggml_metal_library_t) { return nullptr; }
ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t)  { return &the_library; }

const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t) {
    the_props.has_simdgroup_mm           = mtl_device_options.has_simdgroup_mm;
    the_props.has_bfloat                 = mtl_device_options.has_bfloat;
    the_props.has_simdgroup_reduction    = true;
    the_props.max_theadgroup_memory_size = MOST_SHARED;
    return &the_props;
}

// the real one is in Objective-C; what it asks about the ops of tiers is asked here too
bool ggml_metal_device_supports_op(ggml_metal_device_t dev, const ggml_tensor * op) {
    if (op->op == GGML_OP_EXPERT_REMAP || op->op == GGML_OP_MUL_MAT_TIERS) {
        return ggml_metal_tiers_supports_op(ggml_metal_device_get_props(dev), op);
    }
    return true;
}

ggml_metal_device_t ggml_metal_device_init(int, int) { return nullptr; }

void ggml_metal_device_free(ggml_metal_device_t) {}

// all tensors are in one Metal buffer that begins at address 0
ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const ggml_tensor * t) {
    return { &the_library, (size_t) t->data };
}

//
// encoder
//

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool concurrent) {
    auto * enc = new ggml_metal_encoder;
    enc->concurrent = concurrent;
    return enc;
}

void ggml_metal_encoder_free(ggml_metal_encoder_t enc) { delete enc; }

void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop (ggml_metal_encoder_t) {}

void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t enc) { run(enc); }

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t enc) {
    if (enc->n_barriers++ == mtl_device_options.skip_barrier) {
        return;
    }
    mtl_device_records.push_back({ "barrier", 0 });
    run(enc);
}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t enc, ggml_metal_pipeline_with_params p) { enc->pipeline = p.pipeline; }

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t enc, void * data, size_t size, int idx) {
    if (size > MOST_BYTES || idx < 0 || idx >= MTL_N_BUFFERS) {
        mtl_fail("%zu bytes at index %d cannot be set", size, idx);
    }
    enc->args.bytes[idx].assign((char *) data, (char *) data + size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t enc, ggml_metal_buffer_id buffer, int idx) {
    if (idx < 0 || idx >= MTL_N_BUFFERS || buffer.offs % 4 != 0) {
        mtl_fail("a buffer with offset %zu cannot be set at index %d", buffer.offs, idx);
    }
    enc->args.buffer[idx]     = (char *) buffer.offs;
    enc->args.has_buffer[idx] = buffer.metal != nullptr;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t enc, size_t size, int idx) {
    if (size > MOST_SHARED || size % 16 != 0) {
        mtl_fail("%zu bytes of threadgroup memory cannot be set", size);
    }
    if (idx == 0) {
        enc->shared_size = size;
        enc->has_shared  = true;
    }
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t enc, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    const ggml_metal_pipeline & pipeline = *enc->pipeline;
    const char * name = pipeline.kernel->name;

    if (tg0 < 1 || tg1 < 1 || tg2 < 1 || tptg0 < 1 || tptg1 < 1 || tptg2 < 1 || tptg0*tptg1*tptg2 > MOST_THREADS) {
        mtl_fail("%s cannot be dispatched with %d x %d x %d threadgroups of %d x %d x %d threads", name, tg0, tg1, tg2, tptg0, tptg1, tptg2);
    }
    if (pipeline.kernel->n_shared > 0 && !enc->has_shared) {
        mtl_fail("%s is dispatched without a size of its threadgroup memory", name);
    }

    auto args = std::make_shared<mtl_arguments>(std::move(enc->args));

    mtl_dispatch d = {};
    d.name              = name;
    d.n_threadgroups[0] = tg0;
    d.n_threadgroups[1] = tg1;
    d.n_threadgroups[2] = tg2;
    d.n_threads[0]      = tptg0;
    d.n_threads[1]      = tptg1;
    d.n_threads[2]      = tptg2;
    d.shared_size       = enc->shared_size;
    d.select = [&pipeline]() { select_constants(pipeline); };
    d.body   = [&pipeline, args](const mtl_context & context) { pipeline.kernel->launch(*args, context); };
    enc->dispatches.push_back(std::move(d));

    mtl_device_records.push_back({ name, tg0*tg1*tg2 });

    // in Metal arguments stay until they are replaced; here a dispatch must set what its kernel reads
    enc->args        = {};
    enc->shared_size = 0;
    enc->has_shared  = false;

    if (!enc->concurrent) {
        run(enc);
    }
}

} // extern "C"
