// Runs cases: one line of key=value pairs on stdin each, one line of JSON on stdout per schedule.
//
// Exits with status 3 and a message where the host or a kernel does what Metal would refuse, or reads or writes outside its buffers.
#include "device.h"
#include "graphs.h"
#include "threads.h"
#include "weights.h"

#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml-metal-common.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-ops.h"
#include "ggml-metal-tiers.h"

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <sstream>
#include <unistd.h>

#ifdef MTL_MUTANTS
int mtl_mutant = 0; // see kernels.h
#endif

//
// buffers
//

static constexpr size_t ALIGNMENT = 32;

// kernels of MUL_MAT_ID read the rows behind an expert's last where the number of rows is odd for them, the last expert's too
static constexpr size_t WEIGHTS_PADDING = 65536;

static size_t alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    switch (t->op) { // as ggml_backend_metal_buffer_type_get_alloc_size
        case GGML_OP_MUL_MAT_ID:
            return ggml_nbytes(t) + ggml_metal_op_mul_mat_id_extra_tpe(t) + ggml_metal_op_mul_mat_id_extra_ids(t) + ggml_metal_op_mul_mat_id_extra_amax(t);
        case GGML_OP_MUL_MAT_TIERS:
            return ggml_nbytes(t) + ggml_metal_op_mul_mat_tiers_extra(t);
        case GGML_OP_ARGSORT:
            return 2*ggml_nbytes(t);
        default:
            return ggml_nbytes(t);
    }
}

static void * buffer_base(ggml_backend_buffer_t buffer) { return buffer->context; }

static void buffer_free(ggml_backend_buffer_t buffer) { mtl_guarded_free((char *) buffer->context, buffer->size); }

static ggml_backend_buffer_t buffer_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_i iface = {};
    iface.get_base    = buffer_base;
    iface.free_buffer = buffer_free;
    return ggml_backend_buffer_init(buft, iface, mtl_guarded_alloc(GGML_PAD(size, ALIGNMENT), 0xFF), GGML_PAD(size, ALIGNMENT));
}

static ggml_backend_buffer_type make_buffer_type() {
    ggml_backend_buffer_type res = {};
    res.iface.get_name       = [](ggml_backend_buffer_type_t) { return "emulated Metal"; };
    res.iface.alloc_buffer   = buffer_alloc;
    res.iface.get_alignment  = [](ggml_backend_buffer_type_t) { return ALIGNMENT; };
    res.iface.get_alloc_size = alloc_size;
    res.iface.is_host        = [](ggml_backend_buffer_type_t) { return true; };
    return res;
}

static ggml_backend_buffer_type buffer_type = make_buffer_type();
static ggml_backend_buffer      one_buffer  = { {}, &buffer_type, nullptr, 0, GGML_BACKEND_BUFFER_USAGE_ANY };

struct region {
    const ggml_tensor * tensor;
    char *              data;
    size_t              size;
    std::vector<char>   content; // of an input
};

static std::vector<region> regions;

static void on_fault(int, siginfo_t * info, void *) {
    static char message[256];
    int n = snprintf(message, sizeof(message), "metal: access to unmapped memory at %p\n", info->si_addr);
    for (const region & r : regions) {
        const char * at = (const char *) info->si_addr;
        if (at >= r.data - 4096 && at < r.data + r.size + 4096 + 16) {
            n = snprintf(message, sizeof(message), "metal: access at byte %ld of %s '%s', which has %zu\n", (long) (at - r.data),
                    ggml_op_name(r.tensor->op), r.tensor->name, r.size);
        }
    }
    if (write(2, message, n) != n) {
        _exit(4);
    }
    _exit(3);
}

static void catch_faults() {
    static char stack[65536];
    stack_t alternative = {};
    alternative.ss_sp   = stack;
    alternative.ss_size = sizeof(stack);
    sigaltstack(&alternative, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags     = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}

//
// running a graph
//

static size_t padding(const ggml_tensor * t) {
    return strcmp(t->name, EXPERTS_NAME) == 0 ? WEIGHTS_PADDING : 0;
}

static void place_input(ggml_tensor * t) {
    if (t->view_src) {
        t->data   = (char *) t->view_src->data + t->view_offs;
        t->buffer = &one_buffer;
        return;
    }
    const size_t size = ggml_nbytes(t);
    region r = { t, mtl_guarded_alloc(size + padding(t), 0xFF), size, { (char *) t->data, (char *) t->data + size } };
    memcpy(r.data, t->data, size);
    t->data   = r.data;
    t->buffer = &one_buffer;
    regions.push_back(std::move(r));
}

// each result at the end of its own memory, filled with NaN
static void place_result(ggml_tensor * t) {
    if (t->view_src) {
        t->data = (char *) t->view_src->data + t->view_offs;
    } else {
        const size_t size = alloc_size(nullptr, t);
        t->data = mtl_guarded_alloc(size, 0xFF);
        regions.push_back({ t, (char *) t->data, size, {} });
    }
    t->buffer = &one_buffer;
}

static bool is_input(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || (t->view_src && t->view_src->op == GGML_OP_NONE);
}

static void place_inputs(ggml_cgraph * gf) {
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < gf->n_leafs + gf->n_nodes; i++) {
            ggml_tensor * t = i < gf->n_leafs ? gf->leafs[i] : gf->nodes[i - gf->n_leafs];
            if (is_input(t) && (t->view_src != nullptr) == (pass == 1)) {
                place_input(t);
            }
        }
    }
}

// memory is reused as in llama.cpp where `packed`
static ggml_gallocr_t place_results(ggml_cgraph * gf, bool packed) {
    if (!packed) {
        for (int i = 0; i < gf->n_nodes; i++) {
            if (!is_input(gf->nodes[i])) {
                place_result(gf->nodes[i]);
            }
        }
        return nullptr;
    }
    for (int i = 0; i < gf->n_nodes; i++) {
        if (!is_input(gf->nodes[i])) {
            gf->nodes[i]->data   = nullptr;
            gf->nodes[i]->buffer = nullptr;
        }
    }
    ggml_gallocr_t alloc = ggml_gallocr_new(&buffer_type);
    if (!ggml_gallocr_alloc_graph(alloc, gf)) {
        mtl_fail("no memory for the graph");
    }
    return alloc;
}

static void check_inputs() {
    for (const region & r : regions) {
        if (!r.content.empty() && memcmp(r.data, r.content.data(), r.content.size()) != 0) {
            mtl_fail("an input of type %s was written to", ggml_type_name(r.tensor->type));
        }
    }
}

static void free_regions() {
    for (region & r : regions) {
        mtl_guarded_free(r.data, r.size + padding(r.tensor));
    }
    regions.clear();
}

static void run_on_metal(ggml_cgraph * gf, bool fusion, bool concurrency) {
    for (int i = 0; i < gf->n_nodes; i++) {
        gf->nodes[i]->flags |= GGML_TENSOR_FLAG_COMPUTE;
        if (!is_input(gf->nodes[i]) && !ggml_metal_device_supports_op(nullptr, gf->nodes[i])) {
            mtl_fail("%s is not supported", ggml_op_name(gf->nodes[i]->op));
        }
    }
    ggml_metal_fusion_info * info = ggml_metal_fusion_info_init(fusion, 0);
    ggml_metal_op_t op = ggml_metal_op_init(nullptr, nullptr, gf, info, 0, gf->n_nodes, concurrency, false, 0);
    for (int i = 0; i < ggml_metal_op_n_nodes(op);) {
        i += ggml_metal_op_encode(op, i);
    }
    ggml_metal_op_free(op);
    ggml_metal_fusion_info_free(info);
}

//
// comparing
//

struct difference {
    double nmse_cpu   = 0;
    double nmse_exact = 0;
    int    n_bad      = 0; // values that are no numbers
    int    n_zero_bad = 0; // values that must be 0 (of experts that are not held) and are not
};

static difference compare(const graph & g, const std::vector<char> & cpu) {
    difference res;
    if (g.out->type != GGML_TYPE_F32) {
        return res;
    }
    const float * got  = (const float *) g.out->data;
    const float * want = (const float *) cpu.data();
    double e_cpu = 0, s_cpu = 0, e_exact = 0, s_exact = 0;
    for (int64_t i = 0; i < ggml_nelements(g.out); i++) {
        if (!std::isfinite(got[i])) {
            res.n_bad++;
            continue;
        }
        const double exact = g.exact.empty() ? want[i] : g.exact[i];
        res.n_zero_bad += exact == 0.0 && got[i] != 0.0f;
        e_cpu   += (got[i] - want[i])*((double) got[i] - want[i]);
        s_cpu   += (double) want[i]*want[i];
        e_exact += (got[i] - exact)*(got[i] - exact);
        s_exact += exact*exact;
    }
    // all rows may be of experts that are not held; JSON has no infinity
    const auto ratio = [](double e, double s) { return std::min(s > 0 ? e/s : e, 1e30); };
    res.nmse_cpu   = std::isnan(e_cpu)   ? 1e30 : ratio(e_cpu,   s_cpu);
    res.nmse_exact = std::isnan(e_exact) ? 1e30 : ratio(e_exact, s_exact);
    return res;
}

static std::vector<char> bytes_of(const ggml_tensor * t) {
    return { (const char *) t->data, (const char *) t->data + ggml_nbytes(t) };
}

static case_spec parse(const std::string & line) {
    case_spec res;
    std::istringstream words(line);
    std::string word;
    while (words >> word) {
        const size_t eq = word.find('=');
        res.values[word.substr(0, eq)] = eq == std::string::npos ? "" : word.substr(eq + 1);
    }
    return res;
}

static void run_case(const std::string & line) {
    const case_spec spec = parse(line);

    graph g = build_graph(spec);
    ggml_graph_compute_with_ctx(g.ctx.get(), g.gf, 1);

    const std::vector<char> cpu = bytes_of(g.out);
    std::vector<std::vector<char>> cpu_checked;
    for (const ggml_tensor * t : g.checked) {
        cpu_checked.push_back(bytes_of(t));
        if (spec.num("packed", 0)) {
            ggml_set_output((ggml_tensor *) t);
        }
    }

    ggml_graph_optimize(g.gf);
    place_inputs(g.gf);

    std::istringstream schedules(spec.str("schedules", "0"));
    std::string schedule;
    while (std::getline(schedules, schedule, ',')) {
        mtl_device_options.schedule         = atoi(schedule.c_str());
        mtl_device_options.skip_barrier     = spec.num("skip_barrier", -1);
        mtl_device_options.has_simdgroup_mm = spec.num("simdgroup_mm", 1);
        mtl_device_records.clear();
#ifdef MTL_MUTANTS
        mtl_mutant = spec.num("mutant", 0);
#endif
        const size_t n_inputs = regions.size();
        ggml_gallocr_t alloc = place_results(g.gf, spec.num("packed", 0));
        run_on_metal(g.gf, spec.num("fusion", 1), spec.num("concurrency", 1));
        check_inputs();

        const difference d = compare(g, cpu);
        int n_wrong = 0; // results that must be equal bit by bit
        for (size_t i = 0; i < g.checked.size(); i++) {
            n_wrong += memcmp(g.checked[i]->data, cpu_checked[i].data(), cpu_checked[i].size()) != 0;
        }
        uint64_t hash = 14695981039346656037ull; // of the result, FNV-1a
        for (size_t i = 0; i < cpu.size(); i++) {
            hash = (hash ^ ((const unsigned char *) g.out->data)[i])*1099511628211ull;
        }

        printf("{\"schedule\": %s, \"nmse_cpu\": %.3e, \"nmse_exact\": %.3e, \"bad\": %d, \"not_zero\": %d, \"wrong\": %d, \"hash\": \"%016llx\", \"encoded\": [",
                schedule.c_str(), d.nmse_cpu, d.nmse_exact, d.n_bad, d.n_zero_bad, n_wrong, (unsigned long long) hash);
        for (size_t i = 0; i < mtl_device_records.size(); i++) {
            printf("%s[\"%s\", %d]", i ? ", " : "", mtl_device_records[i].name.c_str(), mtl_device_records[i].n_threadgroups);
        }
        printf("]}\n");

        if (alloc) {
            ggml_gallocr_free(alloc);
        }
        while (regions.size() > n_inputs) {
            mtl_guarded_free(regions.back().data, regions.back().size);
            regions.pop_back();
        }
    }
    free_regions();
    fflush(stdout);
}

int main() {
    ggml_cpu_init();
    catch_faults();
    std::string line;
    while (std::getline(std::cin, line)) {
        try {
            run_case(line);
        } catch (const std::exception & e) {
            mtl_fail("%s", e.what());
        }
    }
    return 0;
}
