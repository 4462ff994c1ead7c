// What clang calls to make a bfloat of a float; the compiler's own library may lack it.
#include <cmath>
#include <cstdint>
#include <cstring>

extern "C" __bf16 __truncsfbf2(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const uint16_t res = std::isnan(x) ? (bits >> 16) | 64 : (bits + (0x7FFF + (bits >> 16 & 1))) >> 16; // to nearest, ties to even
    return __builtin_bit_cast(__bf16, res);
}
