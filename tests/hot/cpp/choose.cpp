// llama_hot_choose on cases from stdin, for comparison with rq_gguf/vram/speed.py: a case's choice per line.
//
// A case: layers, experts, experts per token, power, hand-over, that of a layer that is all the host's, the device's experts, seconds per byte in VRAM, bytes for experts, mode, shares known (0 or 1), overlap (0 or 1);
// then per layer and expert: bytes, seconds on the CPU, share.

#include "llama-hot-choice.h"

#include <cstdio>
#include <iostream>

int main() {
    int64_t n_layers, n_expert, n_used;
    double  power, bytes;
    int     mode, known, overlap;

    llama_hot_speeds speeds;
    while (std::cin >> n_layers >> n_expert >> n_used >> power >> speeds.handover >> speeds.whole >> speeds.experts >> speeds.vram >> bytes >> mode >> known >> overlap) {
        std::vector<llama_hot_costs>         costs(n_layers);
        std::vector<const llama_hot_costs *> each;
        for (auto & c : costs) {
            llama_hot_layout layout;
            layout.groups.resize(1);
            std::vector<double> ram(n_expert);
            for (int64_t e = 0; e < n_expert; e++) {
                double size, share;
                std::cin >> size >> ram[e] >> share;
                layout.groups[0].bytes = { (size_t) size };
                layout.groups[0].tier.push_back(0);
                if (known) {
                    layout.share.push_back((float) share);
                }
            }
            c = llama_hot_costs_for(layout, ram, speeds, n_used, power, overlap);
            each.push_back(&c);
        }
        const llama_hot_choice c = llama_hot_choose(each, (size_t) bytes, (llama_hot_mode) mode);
        printf("%lld %lld %zu %.12g\n", (long long) c.whole, (long long) c.slots, c.bytes, c.seconds);
    }
    return 0;
}
