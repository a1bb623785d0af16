/* CPU flags, seeded random numbers, the clock, UTF-8. This file is built with baseline flags only. */
#include "base/base.h"

#include <time.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if defined(__x86_64__)

static uint64_t read_xcr0(void)
{
    uint32_t eax, edx;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return ((uint64_t)edx << 32) | eax;
}

uint32_t kvs_cpu_flags(void)
{
    uint32_t a, b, c, d, flags = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return 0;
    const uint32_t osxsave = 1u << 27, avx = 1u << 28, fma = 1u << 12, f16c = 1u << 29;
    if ((c & (osxsave | avx | fma | f16c)) != (osxsave | avx | fma | f16c))
        return 0;
    const uint64_t xcr0 = read_xcr0(); /* the OS must save the wide registers, or using them corrupts them */
    if ((xcr0 & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    const uint32_t avx2 = 1u << 5, bmi2 = 1u << 8;
    if ((b & (avx2 | bmi2)) != (avx2 | bmi2))
        return 0;
    flags |= KVS_CPU_AVX2;
    const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    if ((xcr0 & 0xe6) != 0xe6 || (b & avx512) != avx512)
        return flags;
    flags |= KVS_CPU_AVX512;
    if (c & 1u << 11)
        flags |= KVS_CPU_VNNI;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5))
        flags |= KVS_CPU_BF16;
    return flags;
}
#elif defined(__aarch64__)
uint32_t kvs_cpu_flags(void)
{
    const unsigned long have = getauxval(AT_HWCAP);
    if (!(have & HWCAP_ASIMD))
        return 0;
    return KVS_CPU_NEON | (have & HWCAP_ASIMDDP ? KVS_CPU_DOTPROD : 0);
}
#else
uint32_t kvs_cpu_flags(void)
{
    return 0;
}
#endif

uint32_t kvs_cpu_masked(uint32_t mask)
{
    uint32_t f = kvs_cpu_flags();
    if (mask != 0)
        f &= mask;
    if (!(f & KVS_CPU_AVX2))
        f &= ~(uint32_t)KVS_CPU_AVX512;
    if (!(f & KVS_CPU_AVX512))
        f &= ~(uint32_t)(KVS_CPU_VNNI | KVS_CPU_BF16);
    if (!(f & KVS_CPU_NEON))
        f &= ~(uint32_t)KVS_CPU_DOTPROD;
    return f;
}

const char *kvs_cpu_isa_name(uint32_t flags)
{
    if (flags & KVS_CPU_VNNI)
        return "avx512vnni";
    if (flags & KVS_CPU_AVX512)
        return "avx512";
    if (flags & KVS_CPU_AVX2)
        return "avx2";
    if (flags & KVS_CPU_DOTPROD)
        return "neondot";
    return flags & KVS_CPU_NEON ? "neon" : "scalar";
}

/* Steele, Lea, Flood: "Fast splittable pseudorandom number generators" (OOPSLA 2014). */
static uint64_t mix64(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t kvs_rng_next(kvs_rng *rng)
{
    rng->state += 0x9e3779b97f4a7c15u;
    return mix64(rng->state);
}

double kvs_rng_double(kvs_rng *rng)
{
    return (double)(kvs_rng_next(rng) >> 11) * 0x1p-53;
}

uint32_t kvs_rng_below(kvs_rng *rng, uint32_t n)
{
    const uint64_t limit = UINT64_MAX - UINT64_MAX % n; /* reject the uneven tail */
    uint64_t x;
    do
        x = kvs_rng_next(rng);
    while (x >= limit);
    return (uint32_t)(x % n);
}

uint64_t kvs_hash3(uint64_t seed, uint64_t a, uint64_t b)
{
    uint64_t h = mix64(seed + 0x9e3779b97f4a7c15u);
    h = mix64(h ^ (a + 0x9e3779b97f4a7c15u));
    return mix64(h ^ (b + 0xd1b54a32d192ed03u));
}

uint64_t kvs_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

size_t kvs_utf8_valid_prefix(const char *text, size_t n_bytes)
{
    const unsigned char *s = (const unsigned char *)text;
    size_t i = 0;
    while (i < n_bytes) {
        const unsigned char c = s[i];
        size_t n;
        uint32_t code;
        if (c < 0x80) {
            i++;
            continue;
        }
        if (c >= 0xc2 && c <= 0xdf) {
            n = 1;
            code = c & 0x1fu;
        } else if (c >= 0xe0 && c <= 0xef) {
            n = 2;
            code = c & 0x0fu;
        } else if (c >= 0xf0 && c <= 0xf4) {
            n = 3;
            code = c & 0x07u;
        } else {
            return i;
        }
        if (n_bytes - i <= n)
            return i;
        for (size_t k = 1; k <= n; k++) {
            if ((s[i + k] & 0xc0) != 0x80)
                return i;
            code = code << 6 | (s[i + k] & 0x3fu);
        }
        if ((n == 2 && (code < 0x800 || (code >= 0xd800 && code <= 0xdfff))) ||
            (n == 3 && (code < 0x10000 || code > 0x10ffff)))
            return i;
        i += n + 1;
    }
    return n_bytes;
}
