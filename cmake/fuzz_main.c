/* A fuzz driver for compilers without libFuzzer: files given are run once each; without files, inputs are mutated from
 * a counter-based generator until -max_total_time=SECONDS is over. No coverage feedback: it finds less, but runs
 * anywhere, and replays what libFuzzer found. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

enum { INPUT_BYTES_MAX = 4096, SEEDS_MAX = 256 };

typedef struct seed {
    uint8_t *data;
    size_t n_bytes;
} seed;

static uint64_t rng_state = 0x9e3779b97f4a7c15u;

static uint32_t draw(uint32_t below)
{
    rng_state ^= rng_state << 13;
    rng_state ^= rng_state >> 7;
    rng_state ^= rng_state << 17;
    return (uint32_t)((rng_state >> 32) % below);
}

static int read_seed(const char *path, seed *out)
{
    FILE *f = fopen(path, "rb");
    if (f == NULL)
        return -1;
    out->data = malloc(1u << 20);
    out->n_bytes = out->data != NULL ? fread(out->data, 1, 1u << 20, f) : 0;
    fclose(f);
    return out->data != NULL ? 0 : -1;
}

static size_t mutate(uint8_t *buf, const seed *s)
{
    size_t n = 0;
    if (s != NULL) {
        n = s->n_bytes < INPUT_BYTES_MAX ? s->n_bytes : INPUT_BYTES_MAX;
        memcpy(buf, s->data, n);
    } else {
        n = draw(draw(8) == 0 ? INPUT_BYTES_MAX : 128);
        for (size_t i = 0; i < n; i++)
            buf[i] = (uint8_t)(draw(2) ? 32 + draw(95) : draw(256));
    }
    for (uint32_t k = draw(8); k > 0 && n > 0; k--) {
        const uint32_t at = draw((uint32_t)n);
        switch (draw(4)) {
        case 0:
            buf[at] ^= (uint8_t)(1u << draw(8));
            break;
        case 1:
            buf[at] = (uint8_t)draw(256);
            break;
        case 2:
            n = at;
            break;
        default:
            memset(buf + at, draw(2) ? 0xff : 0, n - at < 8 ? n - at : 8);
            break;
        }
    }
    return n;
}

int main(int argc, char **argv)
{
    static uint8_t buf[INPUT_BYTES_MAX];
    seed seeds[SEEDS_MAX];
    size_t n_seeds = 0;
    double limit_s = 0;
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "-max_total_time=", 16) == 0)
            limit_s = strtod(argv[i] + 16, NULL);
        else if (argv[i][0] != '-' && n_seeds < SEEDS_MAX && read_seed(argv[i], &seeds[n_seeds]) == 0)
            n_seeds++;
    }
    for (size_t i = 0; i < n_seeds; i++)
        LLVMFuzzerTestOneInput(seeds[i].data, seeds[i].n_bytes);
    uint64_t n_runs = n_seeds;
    const time_t start = time(NULL);
    while (difftime(time(NULL), start) < limit_s) {
        const seed *s = n_seeds > 0 && draw(4) != 0 ? &seeds[draw((uint32_t)n_seeds)] : NULL;
        LLVMFuzzerTestOneInput(buf, mutate(buf, s));
        n_runs++;
    }
    printf("%llu runs\n", (unsigned long long)n_runs);
    for (size_t i = 0; i < n_seeds; i++)
        free(seeds[i].data);
    return 0;
}
