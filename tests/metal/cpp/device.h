// The stand-in for ggml-metal-device.m: how a test sees it.
#pragma once

#include "ggml-metal-device.h"

#include <string>
#include <vector>

struct mtl_options {
    int  schedule       = 0;    // see mtl_run
    int  skip_barrier   = -1;   // number of an encoder barrier that is left out
    bool has_simdgroup_mm = true;
    bool has_bfloat       = true;
};

struct mtl_record {
    std::string name;      // of the kernel, or "barrier"
    int         n_threadgroups;
};

extern mtl_options             mtl_device_options;
extern std::vector<mtl_record> mtl_device_records; // since it was cleared last
