// CUDA_INJECTION64_PATH: writes every kernel and copy with its times to $TRACE_FILE, one line each:
// K device start end name | C source-device destination-device start end bytes kind   (nanoseconds)
#include <cupti.h>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <mutex>

static FILE * out = nullptr;
static std::mutex mutex;

static void CUPTIAPI get_buffer(uint8_t ** buffer, size_t * size, size_t * max_records) {
    *size = 8u*1024*1024;
    *buffer = (uint8_t *) aligned_alloc(8, *size);
    *max_records = 0;
}

static void CUPTIAPI put_buffer(CUcontext, uint32_t, uint8_t * buffer, size_t, size_t valid) {
    std::lock_guard<std::mutex> lock(mutex);
    CUpti_Activity * r = nullptr;
    while (valid > 0 && cuptiActivityGetNextRecord(buffer, valid, &r) == CUPTI_SUCCESS) {
        if (r->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const auto * k = (const CUpti_ActivityKernel10 *) r;
            fprintf(out, "K %u %llu %llu %.80s\n", k->deviceId, (unsigned long long) k->start, (unsigned long long) k->end, k->name ? k->name : "?");
        } else if (r->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const auto * c = (const CUpti_ActivityMemcpy6 *) r;
            fprintf(out, "C %u %u %llu %llu %llu %u\n", c->deviceId, c->deviceId, (unsigned long long) c->start, (unsigned long long) c->end,
                    (unsigned long long) c->bytes, c->copyKind);
        } else if (r->kind == CUPTI_ACTIVITY_KIND_MEMCPY2) {
            const auto * c = (const CUpti_ActivityMemcpyPtoP4 *) r;
            fprintf(out, "C %u %u %llu %llu %llu %u\n", c->srcDeviceId, c->dstDeviceId, (unsigned long long) c->start, (unsigned long long) c->end,
                    (unsigned long long) c->bytes, c->copyKind);
        }
    }
    free(buffer);
}

static void at_end() {
    cuptiActivityFlushAll(1);
    std::lock_guard<std::mutex> lock(mutex);
    fflush(out);
}

extern "C" int InitializeInjection() {
    out = fopen(getenv("TRACE_FILE") ? getenv("TRACE_FILE") : "/tmp/trace.txt", "w");
    if (!out) {
        return 0;
    }
    cuptiActivityRegisterCallbacks(get_buffer, put_buffer);
    for (const CUpti_ActivityKind kind : { CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMCPY2 }) {
        const CUptiResult res = cuptiActivityEnable(kind);
        if (res != CUPTI_SUCCESS) {
            fprintf(stderr, "trace: kind %d not enabled: %d\n", kind, res);
        }
    }
    atexit(at_end);
    return 1;
}
