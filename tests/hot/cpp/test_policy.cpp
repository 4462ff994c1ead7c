// llama_hot_policy: invariants under random counts and exchanges, and the figures that documentation states. Exit status 0 if all hold.

#include "llama-hot-policy.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <stdexcept>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "line %d: %s\n", __LINE__, #x); exit(1); } } while (0)

static llama_hot_layout make_layout(std::mt19937 & rng, int64_t n_expert, int n_groups, int n_tiers, bool with_share) {
    llama_hot_layout res;
    for (int g = 0; g < n_groups; g++) {
        llama_hot_layout::group group;
        for (int t = 0; t < n_tiers; t++) {
            group.bytes.push_back(1000*(t + 1));
        }
        for (int64_t e = 0; e < n_expert; e++) {
            group.tier.push_back((int32_t) (rng() % n_tiers));
        }
        res.groups.push_back(group);
    }
    if (with_share) {
        double sum = 0.0;
        for (int64_t e = 0; e < n_expert; e++) {
            res.share.push_back((float) (1 + rng() % 100));
            sum += res.share.back();
        }
        for (float & s : res.share) {
            s /= (float) sum;
        }
    }
    return res;
}

// every held expert has one slot of its tier in each group, no slot has two experts, no tier more than it can hold
static void check_slots(const llama_hot_policy & p) {
    const auto & layout   = p.get_layout();
    const auto & capacity = p.get_capacity();

    int64_t held = 0;
    for (int64_t e = 0; e < layout.n_expert(); e++) {
        held += p.holds(e);
    }
    CHECK(held == p.n_held());

    for (size_t g = 0; g < layout.groups.size(); g++) {
        std::set<int32_t> ids;
        for (int64_t e = 0; e < layout.n_expert(); e++) {
            const int32_t id = p.slot_id((int) g, e);
            CHECK((id >= 0) == p.holds(e));
            if (id < 0) {
                continue;
            }
            CHECK(ids.insert(id).second);
            int64_t base = 0;
            for (int32_t t = 0; t < layout.groups[g].tier[e]; t++) {
                base += capacity[g][t];
            }
            CHECK(id >= base && id < base + capacity[g][layout.groups[g].tier[e]]);
        }
    }
}

static void test_random(std::mt19937 & rng, int n_groups, int n_tiers, bool with_share) {
    const int64_t n_expert = 8 + rng() % 56;
    const int64_t n_used   = 1 + rng() % 8;
    const auto    layout   = make_layout(rng, n_expert, n_groups, n_tiers, with_share);
    const int64_t n        = rng() % n_expert;

    llama_hot_policy p(layout, llama_hot_capacity_for(layout, n), n_used);
    CHECK(p.exchange_all().size() == (size_t) (p.n_held()*n_groups));
    CHECK(p.n_held() >= n); // the busiest n fit, whatever their tiers
    check_slots(p);

    std::vector<int32_t> ids(n_expert);
    for (int64_t e = 0; e < n_expert; e++) {
        ids[e] = (int32_t) e;
    }
    for (int i = 0; i < 200; i++) {
        for (int k = 0; k < 16; k++) {
            std::shuffle(ids.begin(), ids.end(), rng);
            p.count(ids.data(), n_used);
        }
        const int64_t before = p.n_held();
        if (i % 10 == 0) {
            p.exchange_all();
        } else {
            const auto moved = p.exchange_one();
            CHECK(moved.empty() || moved.size() == (size_t) n_groups);
            CHECK(p.n_held() >= before && p.n_held() <= before + 1);
        }
        check_slots(p);

        if (n_tiers == 1 && i % 10 == 0) {
            // the best n are held
            double worst_in = INFINITY;
            double best_out = 0.0;
            for (int64_t e = 0; e < n_expert; e++) {
                (p.holds(e) ? worst_in : best_out) = p.holds(e) ? std::min(worst_in, p.score(e)) : std::max(best_out, p.score(e));
            }
            CHECK(p.n_held() == n && worst_in >= best_out);
            CHECK(p.exchange_all().empty());
            CHECK(p.exchange_one().empty());
        }
    }
}

static void test_half_life() {
    std::mt19937 rng(1);
    const auto layout = make_layout(rng, 4, 1, 1, false);
    llama_hot_policy p(layout, llama_hot_capacity_for(layout, 1), 1);

    const int32_t a = 2;
    const int32_t b = 3;
    p.count(&a, 1);
    const double first = p.score(a);
    for (int i = 0; i < (int) llama_hot_policy::HALF_LIFE; i++) {
        p.count(&b, 1);
    }
    CHECK(std::abs(p.score(a)/first - 0.5) < 1e-9);
    for (int i = 0; i < 1000000; i++) {
        p.count(&b, 1); // no overflow
    }
    CHECK(std::isfinite(p.score(b)) && std::abs(p.score(b) - 1.0/(1.0 - std::exp2(-1.0/llama_hot_policy::HALF_LIFE))) < 1e-6);
}

static void test_gain() {
    std::mt19937 rng(1);
    const auto layout = make_layout(rng, 2, 1, 1, false);
    llama_hot_policy p(layout, llama_hot_capacity_for(layout, 1), 1);
    const int32_t ids[] = { 0, 1 };

    p.exchange_all(); // nothing is known: the first
    CHECK(p.holds(0));
    for (int i = 0; i < 100; i++) {
        p.count(&ids[i % 2], 1);
    }
    CHECK(p.exchange_one().empty()); // a little busier is not enough
    for (int i = 0; i < 40; i++) {
        p.count(&ids[1], 1);
    }
    CHECK(p.exchange_one().size() == 1 && p.holds(1) && !p.holds(0));
}

static void test_distribute(std::mt19937 & rng) {
    for (int i = 0; i < 50; i++) {
        std::vector<llama_hot_layout> layouts;
        for (int l = 0; l < 5; l++) {
            layouts.push_back(make_layout(rng, 16, 2, 3, true));
        }
        std::vector<const llama_hot_layout *> ptrs;
        size_t all = 0;
        for (const auto & l : layouts) {
            ptrs.push_back(&l);
            all += l.bytes();
        }
        const size_t budget = rng() % (all + 1000);
        const auto   n      = llama_hot_distribute(ptrs, budget);
        size_t sum = 0;
        for (size_t l = 0; l < n.size(); l++) {
            CHECK(n[l] >= 0 && n[l] <= 16);
            sum += n[l] == 16 ? layouts[l].bytes() : llama_hot_capacity_bytes(layouts[l], llama_hot_capacity_for(layouts[l], n[l]));
        }
        CHECK(sum <= budget);
        CHECK(llama_hot_distribute(ptrs, all) == std::vector<int64_t>(5, 16));
        CHECK(llama_hot_distribute(ptrs, 0)   == std::vector<int64_t>(5, 0));
    }
}

static void test_size() {
    const auto bytes = [](const char * text) { return llama_hot_size::parse(text).value; };
    CHECK(bytes("6GiB") == 6.0*(1 << 30) && bytes("1.5 MiB") == 1.5*(1 << 20) && bytes("7GB") == 7e9 && bytes("12") == 12.0 && bytes("2k") == 2048.0);
    CHECK(llama_hot_size::parse("50%").kind == llama_hot_size::SHARE && bytes("50%") == 0.5 && bytes("100 %") == 1.0);
    CHECK(llama_hot_size::parse("auto").kind == llama_hot_size::AUTO);
    for (const char * bad : { "", "x", "-1", "101%", "5 apples", "1e999", "GiB", " 5" }) {
        bool refused = false;
        try {
            llama_hot_size::parse(bad);
        } catch (const std::invalid_argument &) {
            refused = true;
        }
        CHECK(refused);
    }
}

int main() {
    std::mt19937 rng(42);
    for (int i = 0; i < 40; i++) {
        test_random(rng, 1 + i % 2, 1 + i % 4, i % 3 != 0);
    }
    test_half_life();
    test_gain();
    test_distribute(rng);
    test_size();
    return 0;
}
