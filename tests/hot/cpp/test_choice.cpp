// llama_hot_speeds as text, shares that stand in for unknown ones, and what every choice of a layout must hold. Exit status 0 if all hold.

#include "llama-hot-choice.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "line %d: %s\n", __LINE__, #x); exit(1); } } while (0)

static const std::vector<std::string> NAMES = { "f32", "", "q4_K", "q8_0" };

static bool refused(const char * text) {
    try {
        llama_hot_speeds::parse(text, NAMES);
    } catch (const std::invalid_argument &) {
        return true;
    }
    return false;
}

static void test_speeds() {
    const auto s = llama_hot_speeds::parse("ram=5e10,vram=4e11,handover=8e-5,layer=6e-5,experts=2e-5,whole=2e-4,q4_K=4e10", NAMES);
    CHECK(std::fabs(s.ram*5e10 - 1) < 1e-12 && std::fabs(s.vram*4e11 - 1) < 1e-12 && s.handover == 8e-5 && s.layer == 6e-5 && s.experts == 2e-5 && s.whole == 2e-4);
    CHECK(std::fabs(s.ram_of(2)*4e10 - 1) < 1e-12 && s.ram_of(3) == s.ram);

    const auto again = llama_hot_speeds::parse(s.str(NAMES), NAMES);
    CHECK(std::fabs(again.ram/s.ram - 1) < 1e-3 && again.by_type.size() == 1 && again.by_type[0].first == 2);

    const auto t = llama_hot_speeds::parse("ram=6e10,vram=3e11,handover=9e-5,layer=5e-5,experts=1e-5,whole=1e-4,q8_0=7e10,q4_K=3e10", NAMES);
    const auto u = llama_hot_speeds::parse("ram=1e10,vram=1e12,handover=3e-3,layer=4e-5,experts=9e-5,whole=3e-4,q8_0=8e10", NAMES);

    // of two the better one, of three the middle one; of a type those that know it
    for (const auto & both : { llama_hot_speeds::typical({ s, t }), llama_hot_speeds::typical({ t, s }) }) {
        CHECK(both.ram == t.ram && both.vram == s.vram && both.handover == s.handover && both.layer == t.layer && both.experts == t.experts);
        CHECK(both.whole == t.whole && both.by_type.size() == 2 && both.ram_of(3) == t.ram_of(3) && both.ram_of(2) == s.ram_of(2));
    }
    for (const auto & all : { llama_hot_speeds::typical({ s, t, u }), llama_hot_speeds::typical({ u, s, t }) }) {
        CHECK(all.ram == s.ram && all.vram == s.vram && all.handover == t.handover && all.layer == t.layer && all.experts == s.experts);
        CHECK(all.whole == s.whole && all.by_type.size() == 2 && all.ram_of(3) == u.ram_of(3) && all.ram_of(2) == s.ram_of(2));
    }
    CHECK(llama_hot_speeds::typical({ u }).str(NAMES) == u.str(NAMES) && s.ram_of(9) == s.ram);
    CHECK(llama_hot_speeds::parse("ram=5e10 vram=4e11 handover=8e-5", NAMES).handover == 8e-5); // commas separate options of programs

    for (const char * bad : {
            "", "ram", "ram=", "=1", "ram=5e10", "ram=5e10,vram=0,handover=0", "ram=5e10,vram=nan,handover=0", "ram=-5e10,vram=1e12", "ram=5e10,vram=1e12,",
            "ram=5e10,vram=1e12,handover=-1", "ram=5e10,vram=1e12,handover=60", "ram=5e10,vram=1e12,speed=3", "ram=5e10  vram=1e12", "ram=5e10,vram=1e30",
            "ram=5e10,vram=1e12,q4_K=0", "ram=5e10,vram=1e12,=5e10", "ram=1e10x,vram=1e12" }) {
        if (!refused(bad)) {
            fprintf(stderr, "accepted: %s\n", bad);
            exit(1);
        }
    }
}

static void test_typical_shares() {
    for (const auto & [n_expert, n_used] : { std::pair<int64_t, int64_t>{ 32, 4 }, { 128, 8 }, { 8, 2 }, { 16, 1 }, { 4, 4 }, { 1, 1 }, { 256, 8 } }) {
        const auto share = llama_hot_typical_shares(n_expert, n_used);
        double sum = 0.0;
        for (int64_t e = 0; e < n_expert; e++) {
            CHECK(share[e] >= 0.0 && share[e] <= 1.0/n_used + 1e-9);
            CHECK(e == 0 || share[e] <= share[e - 1] + 1e-9);
            sum += share[e];
        }
        CHECK(std::fabs(sum - 1.0) < 1e-9);
    }
    const auto share = llama_hot_typical_shares(32, 4);
    double half = 0.0;
    for (int e = 0; e < 16; e++) {
        half += share[e];
    }
    CHECK(std::fabs(half - 0.74) < 1e-9);
}

// tiers, and layers of unequal size: never over the budget, never slower than stock's layout, never slower with more memory
static void test_choices(std::mt19937 & rng) {
    const int64_t n_layers = 1 + rng() % 6;
    const int64_t n_expert = 1 + rng() % 16;
    const int64_t n_used   = 1 + rng() % n_expert;
    const int     n_groups = 1 + rng() % 2;
    const int     n_tiers  = 1 + rng() % 3;
    const bool    overlap  = rng() % 2;

    llama_hot_speeds speeds;
    speeds.vram     = 1e-12;
    speeds.handover = 1e-6*(rng() % 100);

    std::vector<llama_hot_costs>         costs;
    std::vector<const llama_hot_costs *> each;
    size_t total = 0;
    for (int64_t i = 0; i < n_layers; i++) {
        llama_hot_layout layout;
        for (int g = 0; g < n_groups; g++) {
            llama_hot_layout::group group;
            for (int t = 0; t < n_tiers; t++) {
                group.bytes.push_back(1000000*(1 + rng() % 5));
            }
            for (int64_t e = 0; e < n_expert; e++) {
                group.tier.push_back((int32_t) (rng() % n_tiers));
            }
            layout.groups.push_back(group);
        }
        if (rng() % 2) {
            layout.share.assign(n_expert, 1.0f/n_expert);
        }
        std::vector<double> ram;
        for (int64_t e = 0; e < n_expert; e++) {
            ram.push_back(layout.bytes(e)/5e10);
        }
        costs.push_back(llama_hot_costs_for(layout, ram, speeds, n_used, LLAMA_HOT_MISSED_ADAPTED, overlap));
        CHECK((int64_t) costs.back().bytes.size() == n_expert + 1 && costs.back().bytes[0] == 0 && costs.back().bytes[n_expert] == layout.bytes());
        CHECK(costs.back().hits[0] == 0.0 && costs.back().hits[n_expert] == 1.0);
        total += layout.bytes();
    }
    for (const auto & c : costs) {
        each.push_back(&c);
    }

    double before = INFINITY;
    for (int i = 0; i <= 20; i++) {
        const size_t bytes = total/20*i + (i == 20 ? total % 20 : 0);
        const auto best   = llama_hot_choose(each, bytes, LLAMA_HOT_FASTEST);
        const auto slots  = llama_hot_choose(each, bytes, LLAMA_HOT_SLOTS);
        const auto layers = llama_hot_choose(each, bytes, LLAMA_HOT_LAYERS);
        CHECK(best.bytes <= bytes && slots.bytes <= bytes && layers.bytes <= bytes);
        CHECK(best.seconds <= slots.seconds && best.seconds <= layers.seconds && best.seconds <= before);
        CHECK(layers.slots == 0 || layers.slots == n_expert || layers.whole == n_layers);
        CHECK(slots.whole == 0 || slots.slots == n_expert || slots.whole == n_layers);
        before = best.seconds;
    }
    CHECK(llama_hot_choose(each, total, LLAMA_HOT_FASTEST).bytes == total || before < 1e-3);
}

// two experts of which a token uses both: the busier one's slot is read while the host has the other, 2 s there and 0.25 s here
static void test_overlap() {
    llama_hot_layout layout;
    layout.groups.resize(1);
    layout.groups[0].bytes = { 1000 };
    layout.groups[0].tier  = { 0, 0 };
    layout.share           = { 0.5f, 0.5f };

    llama_hot_speeds speeds;
    speeds.vram     = 0.25/1000;
    speeds.handover = 1.0;

    const std::vector<double> ram = { 2.0, 2.0 };
    const auto seconds = [&](bool overlap) { return llama_hot_costs_for(layout, ram, speeds, 2, 1.0, overlap).seconds; };

    const auto apart = seconds(false);
    CHECK(std::fabs(apart[0] - 5.0) < 1e-9 && std::fabs(apart[1] - 3.25) < 1e-9 && std::fabs(apart[2] - 0.5) < 1e-9);

    // each is the busier one's with a half, independently: 0, 1 or 2 of them are the host's with 1/4, 1/2 and 1/4
    const auto both = seconds(true);
    CHECK(both[0] == apart[0] && std::fabs(both[1] - (1.0 + 0.5/4 + 2.0/2 + 4.0/4)) < 1e-9 && both[2] == apart[2]);

    speeds.whole = 3.0; // of a layer that is all the host's
    const auto longer = seconds(true);
    CHECK(std::fabs(longer[0] - 7.0) < 1e-9 && longer[1] == both[1] && longer[2] == both[2]);
}

int main() {
    std::mt19937 rng(42);
    test_overlap();
    test_speeds();
    test_typical_shares();
    for (int i = 0; i < 300; i++) {
        test_choices(rng);
    }
    return 0;
}
