/* Attention over pages for one vector width. attention_avx2.c and attention_avx512.c include a simd_*.h first.
 *
 * Scores: lanes are slots. Six query vectors beside VF_TILE vectors of keys stay in registers over all dims, so each
 * loaded key serves six queries. Keys that several blocks of six share, or that must be rotated, are widened once per
 * page into f32 tiles of the same layout. Output: lanes are dims; six queries beside VF_TILE vectors of values stay in
 * registers over the slots of a page. Dead tiles are skipped, which changes no bit (attention_ref.c says why).
 */
/* Unrolled steps stand in columns, one step a line. */
/* clang-format off */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define INLINE static inline __attribute__((always_inline))

enum {
    BLOCK = 6,  /* query vectors of one register tile */
    SLAB = 24,  /* query vectors that share a widened page: 8 rows of a group of 3 */
    CHAINS = 4,
    DIM_MAX = 256,
    TILES = KVS_PAGE_SLOTS / KVS_TILE_SLOTS,
    TILE_VECS = KVS_TILE_SLOTS / VF_LANES,
    GROUP_TILES = VF_TILE / TILE_VECS, /* key tiles of one register tile */
    WIDE_TILES = 3, /* so many live tiles of four make computing all four cheaper than each alone */
    FEW = 3,        /* query vectors, one row of a group of 3: twice as many vectors beside them fill the registers */
    FEW_VECS = VF_LANES == 8 ? 2 * VF_TILE : VF_TILE,
};

/* ---- keys ---- */

INLINE vf load_any(const void *base, bool f16, size_t at)
{
    return f16 ? vf_load_f16((const uint16_t *)base + at) : vf_load((const float *)base + at);
}

/* Streams of 2 KiB in pages of 8 are too short for the hardware's prefetchers: 14 GB/s plain reading, 7 GB/s here, 10
 * with this (one thread, 177 MB of cache, a Xeon with AVX-512). So each page asks for the lines of the next. */
INLINE void ask_for(const void *base, size_t at_bytes) { __builtin_prefetch((const char *)base + at_bytes, 0, 3); }

/* What follows a page, or the page itself at the end: asking for what is there costs next to nothing. */
static const kvs_page_view *page_after(const kvs_attn_job *job, uint32_t page)
{
    const uint32_t last = (kvs_attn_n_slots(job) - 1) / KVS_PAGE_SLOTS;
    return &job->pages[kvs_min_u32(page + 1, last)];
}

/* In [16 lanes] pointers to n floats, out [n][16]. */
static void transpose_lanes(const float *const *in, uint32_t n, float *out)
{
    for (uint32_t half = 0; half < KVS_TILE_SLOTS; half += 8) {
        uint32_t i = 0;
        for (; i + 8 <= n; i += 8)
            vf_transpose_8x8(in + half, i, out + (size_t)i * KVS_TILE_SLOTS + half, KVS_TILE_SLOTS);
        for (; i < n; i++)
            for (uint32_t lane = half; lane < half + 8; lane++)
                out[(size_t)i * KVS_TILE_SLOTS + lane] = in[lane][i];
    }
}

/* Rotates the pairs of one tile. cos_sin is [2 n_freq][16], a lane each, with shared false, and [2 n_freq] else. */
INLINE void rotate_tile(float *dst, const void *src, bool f16, uint32_t n_freq, const float *cos_sin, bool shared,
                        uint32_t negative)
{
    for (uint32_t i = 0; i < n_freq; i++) {
        for (uint32_t h = 0; h < KVS_TILE_SLOTS; h += VF_LANES) {
            const size_t at = (size_t)i * 2 * KVS_TILE_SLOTS + h;
            const vf a = load_any(src, f16, at), b = load_any(src, f16, at + KVS_TILE_SLOTS);
            vf c, s;
            if (shared) {
                c = vf_set1(cos_sin[i]);
                s = vf_set1(cos_sin[n_freq + i]);
            } else {
                c = vf_load(cos_sin + (size_t)i * KVS_TILE_SLOTS + h);
                s = vf_load(cos_sin + (size_t)(n_freq + i) * KVS_TILE_SLOTS + h);
                s = vf_select(vm_from_bits(negative >> h), vf_neg(s), s);
            }
            vf_store(dst + at, vf_fma(a, c, vf_neg(vf_mul(b, s))));
            vf_store(dst + at + KVS_TILE_SLOTS, vf_fma(a, s, vf_mul(b, c)));
        }
    }
}

/* Lanes with different deltas: table rows of the distances, transposed; the sign of a delta is the sign of its sine.
 * Dead lanes take the first live one's row. */
static void rotate_lanes(float *dst, const void *src, bool f16, const kvs_rope_table *rope, const int32_t *delta,
                         uint32_t live)
{
    const uint32_t n = 2 * rope->n_freq, first = (uint32_t)__builtin_ctz(live);
    float far[KVS_TILE_SLOTS][DIM_MAX], cos_sin[DIM_MAX * KVS_TILE_SLOTS];
    const float *rows[KVS_TILE_SLOTS];
    uint32_t negative = 0;
    for (uint32_t lane = 0; lane < KVS_TILE_SLOTS; lane++) {
        const int32_t d = delta[live >> lane & 1u ? lane : first];
        const uint32_t dist = d < 0 ? -(uint32_t)d : (uint32_t)d;
        negative |= (uint32_t)(d < 0) << lane;
        if (dist < rope->n_pos) {
            rows[lane] = rope->rows + (size_t)dist * n;
        } else {
            for (uint32_t i = 0; i < rope->n_freq; i++) {
                far[lane][i] = (float)cos((double)dist * rope->theta[i]);
                far[lane][rope->n_freq + i] = (float)sin((double)dist * rope->theta[i]);
            }
            rows[lane] = far[lane];
        }
    }
    transpose_lanes(rows, n, cos_sin);
    rotate_tile(dst, src, f16, rope->n_freq, cos_sin, false, negative);
}

/* Widens one tile of keys to dst [head_dim][16], rotated to where they stand. live: the tile's live lanes. */
INLINE void key_tile(const kvs_attn_job *job, const kvs_page_view *page, uint32_t tile, uint32_t live, float *dst,
                     bool f16)
{
    const size_t at = (size_t)tile * job->head_dim * KVS_TILE_SLOTS;
    const void *const src = f16 ? (const void *)((const uint16_t *)page->k + at)
                                : (const void *)((const float *)page->k + at);
    uint32_t n_rotated = 0;
    if (page->rotated && live) {
        int32_t delta[KVS_TILE_SLOTS];
        const uint32_t first = (uint32_t)__builtin_ctz(live);
        uint32_t differ = 0;
        for (uint32_t lane = 0; lane < KVS_TILE_SLOTS; lane++) {
            const uint32_t s = tile * KVS_TILE_SLOTS + lane;
            delta[lane] = (int32_t)((uint32_t)page->rope_pos[s] - (uint32_t)page->key_rot[s]);
        }
        for (uint32_t lane = 0; lane < KVS_TILE_SLOTS; lane++)
            differ |= (uint32_t)(delta[lane] != delta[first]) << lane;
        if (differ & live) {
            rotate_lanes(dst, src, f16, job->rope, delta, live);
            n_rotated = job->rope->n_freq;
        } else if (delta[first]) {
            float row[DIM_MAX];
            kvs_rope_row(job->rope, delta[first], row);
            rotate_tile(dst, src, f16, job->rope->n_freq, row, true, 0);
            n_rotated = job->rope->n_freq;
        }
    }
    for (size_t i = 2 * (size_t)n_rotated * KVS_TILE_SLOTS; i < (size_t)job->head_dim * KVS_TILE_SLOTS; i += VF_LANES)
        vf_store(dst + i, load_any(src, f16, i));
}

/* ---- scores ---- */

typedef struct score_slab {
    const kvs_attn_job *job;
    uint32_t first, n;     /* query vectors */
    float *scores;         /* row of query vector `first` */
    size_t stride;
    const void *next;      /* keys of the page to come */
    uint64_t mask[SLAB];   /* slots of the page at hand */
    vf max[SLAB];
    _Alignas(64) float q[SLAB * DIM_MAX];              /* [blocks][head_dim][BLOCK] */
    _Alignas(64) float keys[KVS_PAGE_SLOTS * DIM_MAX]; /* [4][head_dim][16] widened */
} score_slab;

/* Scores of nq query vectors against nv vectors of slots, the first of them slot_vec of the page. */
INLINE void score_tile(score_slab *c, uint32_t block, uint32_t page, const void *keys, bool f16, uint32_t slot_vec,
                       const int nq, const int nv)
{
    const size_t dims = c->job->head_dim, tile = slot_vec / TILE_VECS, within = slot_vec % TILE_VECS * VF_LANES;
    const size_t step = TILE_VECS == 1 ? dims * KVS_TILE_SLOTS : VF_LANES;
    const size_t base = tile * dims * KVS_TILE_SLOTS + within;
    const float *const q = c->q + block * BLOCK * dims;
    vf acc[BLOCK][VF_TILE];
    UNROLL for (int i = 0; i < nq; i++)
        UNROLL for (int v = 0; v < nv; v++)
            acc[i][v] = vf_set1(0.0f);
    for (size_t d = 0; d < dims; d++) {
        vf k[VF_TILE];
        UNROLL for (int v = 0; v < nv; v++)
            k[v] = load_any(keys, f16, base + d * KVS_TILE_SLOTS + (size_t)v * step);
        if (f16) /* read straight from the cache; a widened page was asked for while the one before was widened */
            UNROLL for (int v = 0; v < nv * VF_LANES / KVS_TILE_SLOTS; v += 2)
                ask_for(c->next, (tile * dims + d * (size_t)(nv * VF_LANES / KVS_TILE_SLOTS) + (size_t)v) * 32);
        UNROLL for (int i = 0; i < nq; i++) {
            const vf qd = vf_set1(q[d * BLOCK + (size_t)i]);
            UNROLL for (int v = 0; v < nv; v++)
                acc[i][v] = vf_fma(qd, k[v], acc[i][v]);
        }
    }
    const vf scale = vf_set1(c->job->scale), dead = vf_set1(-INFINITY);
    UNROLL for (int i = 0; i < nq; i++) {
        const uint32_t j = block * BLOCK + (uint32_t)i;
        float *const row = c->scores + j * c->stride + (size_t)page * KVS_PAGE_SLOTS;
        UNROLL for (int v = 0; v < nv; v++) {
            const uint32_t at = (slot_vec + (uint32_t)v) * VF_LANES;
            const vf s = vf_select(vm_from_bits((uint32_t)(c->mask[j] >> at)), vf_mul(acc[i][v], scale), dead);
            vf_store(row + at, s);
            c->max[j] = vf_max(s, c->max[j]);
        }
    }
}

#define SCORE_CASES(name, f16, nv)                                                                                     \
    static void name(score_slab *c, uint32_t block, uint32_t page, const void *keys, uint32_t slot_vec, uint32_t nq)   \
    {                                                                                                                  \
        switch (nq) {                                                                                                  \
        case 1: score_tile(c, block, page, keys, f16, slot_vec, 1, nv); break;                                         \
        case 2: score_tile(c, block, page, keys, f16, slot_vec, 2, nv); break;                                         \
        case 3: score_tile(c, block, page, keys, f16, slot_vec, 3, nv); break;                                         \
        case 4: score_tile(c, block, page, keys, f16, slot_vec, 4, nv); break;                                         \
        case 5: score_tile(c, block, page, keys, f16, slot_vec, 5, nv); break;                                         \
        default: score_tile(c, block, page, keys, f16, slot_vec, 6, nv); break;                                        \
        }                                                                                                              \
    }
SCORE_CASES(score_f16_one, true, TILE_VECS)
SCORE_CASES(score_f32_one, false, TILE_VECS)
#if VF_PAGE_AT_ONCE
SCORE_CASES(score_f16_page, true, VF_TILE)
SCORE_CASES(score_f32_page, false, VF_TILE)
#endif

static void pack_queries(score_slab *c)
{
    const size_t dims = c->job->head_dim;
    for (uint32_t j = 0; j < c->n; j++) {
        const float *const q = kvs_attn_query(c->job, c->first + j);
        float *const to = c->q + j / BLOCK * BLOCK * dims + j % BLOCK;
        for (size_t d = 0; d < dims; d++)
            to[d * BLOCK] = q[d];
    }
}

/* Scores of one page; n_tiles of it have room in the score rows. */
static void score_page(score_slab *c, uint32_t page_index, uint32_t n_tiles)
{
    const kvs_attn_job *const job = c->job;
    const kvs_page_view *const page = &job->pages[page_index];
    uint64_t live = 0; /* limits ascend with rows, but a slab may start within one */
    for (uint32_t j = 0; j < c->n; j++) {
        c->mask[j] = kvs_attn_row_mask(job, page_index, (c->first + j) / job->group);
        live |= c->mask[j];
    }
    uint32_t todo = 0; /* tiles */
    for (uint32_t t = 0; t < n_tiles; t++)
        todo |= (uint32_t)((live >> t * KVS_TILE_SLOTS & 0xffffu) != 0) << t;
    const bool at_once = GROUP_TILES == TILES && n_tiles == TILES && __builtin_popcount(todo) >= WIDE_TILES;
    if (at_once)
        todo = (1u << TILES) - 1;
    const bool direct = !page->rotated && (job->kv_f32 || c->n <= BLOCK), f16 = direct && !job->kv_f32;
    const void *const keys = direct ? page->k : c->keys;
    c->next = page_after(job, page_index)->k;
    for (uint32_t t = 0; t < n_tiles; t++) {
        const uint32_t lanes = (uint32_t)(page->live >> t * KVS_TILE_SLOTS) & 0xffffu;
        float *const dst = c->keys + (size_t)t * job->head_dim * KVS_TILE_SLOTS;
        if (!(todo >> t & 1u)) {
            for (uint32_t j = 0; j < c->n; j++)
                for (uint32_t h = 0; h < KVS_TILE_SLOTS; h += VF_LANES)
                    vf_store(c->scores + j * c->stride + (size_t)page_index * KVS_PAGE_SLOTS + t * KVS_TILE_SLOTS + h,
                             vf_set1(-INFINITY));
        } else if (!direct && job->kv_f32) {
            key_tile(job, page, t, lanes, dst, false);
        } else if (!direct) {
            for (size_t line = 0; line < (size_t)job->head_dim * KVS_TILE_SLOTS * 2; line += 64)
                ask_for(c->next, (size_t)t * job->head_dim * KVS_TILE_SLOTS * 2 + line);
            key_tile(job, page, t, lanes, dst, true);
        }
    }
    for (uint32_t b = 0; b * BLOCK < c->n; b++) {
        const uint32_t nq = kvs_min_u32(BLOCK, c->n - b * BLOCK);
#if VF_PAGE_AT_ONCE
        if (at_once) {
            (f16 ? score_f16_page : score_f32_page)(c, b, page_index, keys, 0, nq);
            continue;
        }
#endif
        for (uint32_t t = 0; t < n_tiles; t++)
            if (todo >> t & 1u)
                (f16 ? score_f16_one : score_f32_one)(c, b, page_index, keys, t * TILE_VECS, nq);
    }
}

static void attend_scores(const kvs_attn_job *job, uint32_t slot_begin, uint32_t slot_end, float *scores,
                          size_t score_stride, float *m_part)
{
    const uint32_t n_query = job->n_rows * job->group;
    const uint32_t end = (uint32_t)kvs_round_up(kvs_min_u32(slot_end, kvs_attn_n_slots(job)), KVS_TILE_SLOTS);
    score_slab c;
    c.job = job;
    c.stride = score_stride;
    for (c.first = 0; c.first < n_query; c.first += SLAB) {
        c.n = kvs_min_u32(SLAB, n_query - c.first);
        c.scores = scores + c.first * score_stride;
        pack_queries(&c);
        for (uint32_t j = 0; j < c.n; j++)
            c.max[j] = vf_set1(-INFINITY);
        for (uint32_t slot = slot_begin; slot < end; slot += KVS_PAGE_SLOTS)
            score_page(&c, slot / KVS_PAGE_SLOTS, kvs_min_u32(TILES, (end - slot) / KVS_TILE_SLOTS));
        for (uint32_t j = 0; j < c.n; j++) {
            float lanes[VF_LANES], m = -INFINITY;
            vf_store(lanes, c.max[j]);
            for (uint32_t i = 0; i < VF_LANES; i++)
                m = lanes[i] > m ? lanes[i] : m;
            m_part[c.first + j] = m + 0.0f; /* one zero, whichever lane it came from */
        }
    }
}

/* ---- output ---- */

/* acc[i] += p[i][s] * v[s] for s in [begin, end), nd vectors of dims. v and acc point at the first dim. */
INLINE void output_tile(float *acc, size_t dim_stride, const float *p, const void *v, bool f16, size_t v_stride,
                        uint32_t begin, uint32_t end, const void *next, const int nq, const int nd)
{
    vf sum[BLOCK][FEW_VECS];
    UNROLL for (int i = 0; i < nq; i++)
        UNROLL for (int h = 0; h < nd; h++)
            sum[i][h] = vf_load(acc + (size_t)i * dim_stride + (size_t)h * VF_LANES);
    for (uint32_t s = begin; s < end; s++) {
        if (f16)
            UNROLL for (int h = 0; h < nd; h += 64 / (2 * VF_LANES))
                ask_for(next, (s * v_stride + (size_t)h * VF_LANES) * 2);
        vf few[BLOCK]; /* what is fewer stays in registers while the other passes: 12 sums fill most of them */
        UNROLL for (int h = 0; h < nd && nd <= nq; h++)
            few[h] = load_any(v, f16, s * v_stride + (size_t)h * VF_LANES);
        UNROLL for (int i = 0; i < nq && nq < nd; i++)
            few[i] = vf_set1(p[(size_t)i * KVS_PAGE_SLOTS + s]);
        UNROLL for (int h = 0; h < nd && nq < nd; h++) {
            const vf value = load_any(v, f16, s * v_stride + (size_t)h * VF_LANES);
            UNROLL for (int i = 0; i < nq; i++)
                sum[i][h] = vf_fma(few[i], value, sum[i][h]);
        }
        UNROLL for (int i = 0; i < nq && nd <= nq; i++) {
            const vf weight = vf_set1(p[(size_t)i * KVS_PAGE_SLOTS + s]);
            UNROLL for (int h = 0; h < nd; h++)
                sum[i][h] = vf_fma(weight, few[h], sum[i][h]);
        }
    }
    UNROLL for (int i = 0; i < nq; i++)
        UNROLL for (int h = 0; h < nd; h++)
            vf_store(acc + (size_t)i * dim_stride + (size_t)h * VF_LANES, sum[i][h]);
}

#define OUTPUT_CASES(name, f16, nd)                                                                                    \
    static void name(float *acc, size_t dim_stride, const float *p, const void *v, size_t v_stride, uint32_t begin,    \
                     uint32_t end, const void *next, uint32_t nq)                                                      \
    {                                                                                                                  \
        switch (nq) {                                                                                                  \
        case 1: output_tile(acc, dim_stride, p, v, f16, v_stride, begin, end, next, 1, nd); break;                     \
        case 2: output_tile(acc, dim_stride, p, v, f16, v_stride, begin, end, next, 2, nd); break;                     \
        case 3: output_tile(acc, dim_stride, p, v, f16, v_stride, begin, end, next, 3, nd); break;                     \
        case 4: output_tile(acc, dim_stride, p, v, f16, v_stride, begin, end, next, 4, nd); break;                     \
        case 5: output_tile(acc, dim_stride, p, v, f16, v_stride, begin, end, next, 5, nd); break;                     \
        default: output_tile(acc, dim_stride, p, v, f16, v_stride, begin, end, next, 6, nd); break;                    \
        }                                                                                                              \
    }
OUTPUT_CASES(output_f16_4, true, VF_TILE)
OUTPUT_CASES(output_f32_4, false, VF_TILE)
OUTPUT_CASES(output_f16_2, true, VF_TILE / 2)
OUTPUT_CASES(output_f32_2, false, VF_TILE / 2)
OUTPUT_CASES(output_f16_1, true, 1)
OUTPUT_CASES(output_f32_1, false, 1)

static void output_few(float *acc, size_t dim_stride, const float *p, const void *v, bool f16, size_t v_stride,
                       uint32_t begin, uint32_t end, const void *next, uint32_t nq)
{
#define FEW_CASE(n)                                                                                                    \
    f16 ? output_tile(acc, dim_stride, p, v, true, v_stride, begin, end, next, n, FEW_VECS)                            \
        : output_tile(acc, dim_stride, p, v, false, v_stride, begin, end, next, n, FEW_VECS)
    switch (nq) {
    case 1: FEW_CASE(1); break;
    case 2: FEW_CASE(2); break;
    default: FEW_CASE(FEW); break;
    }
#undef FEW_CASE
}

/* Values [begin, end) of a page as f32 rows of dim_stride: dims [dim_begin, dim_end), zeros up to a multiple of 16. */
static void widen_values(float *dst, size_t dim_stride, const void *v, const void *ahead, bool f16, uint32_t head_dim,
                         uint32_t begin, uint32_t end, uint32_t dim_begin, uint32_t dim_end)
{
    const uint32_t padded = (uint32_t)kvs_round_up(dim_end, 16);
    for (uint32_t s = begin; s < end; s++) {
        const size_t row = (size_t)s * head_dim;
        float *const to = dst + s * dim_stride;
        for (size_t line = dim_begin; f16 && line < dim_end; line += 32)
            ask_for(ahead, (row + line) * 2);
        uint32_t d = dim_begin;
        for (; d + VF_LANES <= dim_end; d += VF_LANES)
            vf_store(to + d, load_any(v, f16, row + d));
        for (; d < dim_end; d++)
            to[d] = f16 ? kvs_f16_to_f32_one(((const uint16_t *)v)[row + d]) : ((const float *)v)[row + d];
        for (; d < padded; d++)
            to[d] = 0.0f;
    }
}

/* Sums of weights: each is one chain, so only several side by side fill the time an addition takes. */
INLINE void add_chains(const kvs_attn_scratch *sc, uint32_t j, uint32_t begin, uint32_t end, const int n)
{
    const float *const p = sc->p + (size_t)j * KVS_PAGE_SLOTS;
    float sum[CHAINS];
    UNROLL for (int i = 0; i < n; i++)
        sum[i] = sc->l[j + (uint32_t)i];
    for (uint32_t s = begin; s < end; s++)
        UNROLL for (int i = 0; i < n; i++)
            sum[i] += p[(size_t)i * KVS_PAGE_SLOTS + s];
    UNROLL for (int i = 0; i < n; i++)
        sc->l[j + (uint32_t)i] = sum[i];
}

/* Weights of slots [begin, end) of a page, and their sums. record: NULL, or where the page's weights are left behind. */
static void weights(const kvs_attn_scratch *sc, const float *scores, size_t score_stride, uint32_t n_query,
                    uint32_t begin, uint32_t end, float *record, size_t record_stride)
{
    for (uint32_t j = 0; j < n_query; j++)
        for (uint32_t s = begin; s < end; s += VF_LANES) {
            const vf p = vf_exp(vf_sub(vf_load(scores + j * score_stride + s), vf_set1(sc->sub[j])));
            vf_store(sc->p + (size_t)j * KVS_PAGE_SLOTS + s, p);
            if (record)
                vf_store(record + j * record_stride + s, p);
        }
    for (uint32_t j = 0; j < n_query; j += CHAINS)
        switch (n_query - j) {
        case 1: add_chains(sc, j, begin, end, 1); break;
        case 2: add_chains(sc, j, begin, end, 2); break;
        case 3: add_chains(sc, j, begin, end, 3); break;
        default: add_chains(sc, j, begin, end, CHAINS); break;
        }
}

/* Adds slots [begin, end) of one page, all of live tiles, to the sums of every query. */
static void output_run(const kvs_attn_job *job, const kvs_attn_scratch *sc, uint32_t page_index, uint32_t begin,
                       uint32_t end, uint32_t dim_begin, uint32_t dim_end)
{
    const kvs_page_view *const page = &job->pages[page_index];
    const void *const ahead = page_after(job, page_index)->v;
    const uint32_t n_query = job->n_rows * job->group;
    const bool direct = dim_end % 16 == 0 && (job->kv_f32 || n_query <= BLOCK), f16 = direct && !job->kv_f32;
    if (!direct)
        widen_values(sc->v, sc->dim_stride, page->v, ahead, !job->kv_f32, job->head_dim, begin, end, dim_begin,
                     dim_end);
    const void *const v = direct ? page->v : sc->v;
    const size_t v_stride = direct ? job->head_dim : sc->dim_stride;
    const uint32_t padded = (uint32_t)kvs_round_up(dim_end, 16);
    for (uint32_t j = 0; j < n_query; j += BLOCK) {
        const uint32_t nq = kvs_min_u32(BLOCK, n_query - j);
        const float *const p = sc->p + (size_t)j * KVS_PAGE_SLOTS;
        for (uint32_t d = dim_begin, step; d < padded; d += step) {
            const uint32_t left = (padded - d) / VF_LANES;
            const bool few = (int)FEW_VECS > (int)VF_TILE && nq <= FEW && left >= FEW_VECS;
            const uint32_t nd = few                   ? (uint32_t)FEW_VECS
                                : left >= VF_TILE     ? VF_TILE
                                : left >= VF_TILE / 2 ? VF_TILE / 2
                                                      : 1;
            const void *const at = f16 ? (const void *)((const uint16_t *)v + d) : (const void *)((const float *)v + d);
            const void *const next = f16 ? (const void *)((const uint16_t *)ahead + d) : ahead;
            float *const acc = sc->acc + j * sc->dim_stride + d;
            if (few)
                output_few(acc, sc->dim_stride, p, at, f16, v_stride, begin, end, next, nq);
            else if (nd == VF_TILE)
                (f16 ? output_f16_4 : output_f32_4)(acc, sc->dim_stride, p, at, v_stride, begin, end, next, nq);
            else if (nd == VF_TILE / 2)
                (f16 ? output_f16_2 : output_f32_2)(acc, sc->dim_stride, p, at, v_stride, begin, end, next, nq);
            else
                (f16 ? output_f16_1 : output_f32_1)(acc, sc->dim_stride, p, at, v_stride, begin, end, next, nq);
            step = nd * VF_LANES;
        }
    }
}

static void write_output(const kvs_attn_job *job, const kvs_attn_scratch *sc, uint32_t dim_begin, uint32_t dim_end)
{
    for (uint32_t j = 0; j < job->n_rows * job->group; j++) {
        float *const out = job->out + (j / job->group) * job->out_stride + (size_t)(j % job->group) * job->head_dim;
        const float *const acc = sc->acc + j * sc->dim_stride;
        const float inv = sc->l[j] == 0.0f ? 0.0f : 1.0f / sc->l[j];
        for (uint32_t d = dim_begin; d < dim_end; d++)
            out[d] = acc[d] * inv + 0.0f;
        if (job->l && dim_begin == 0)
            job->l[j] = sc->l[j];
    }
}

static void attend_output(const kvs_attn_job *job, const float *scores, size_t score_stride, const float *m,
                          uint32_t dim_begin, uint32_t dim_end, void *scratch)
{
    const kvs_attn_scratch sc = kvs_attn_scratch_split(job, scratch);
    const uint32_t n_query = job->n_rows * job->group, n_slots = kvs_attn_n_slots(job);
    float *const record = dim_begin == 0 ? job->weights : NULL;
    memset(sc.acc, 0, n_query * sc.dim_stride * sizeof *sc.acc);
    memset(sc.l, 0, n_query * sizeof *sc.l);
    for (uint32_t j = 0; j < n_query; j++)
        sc.sub[j] = kvs_max_or_zero(m[j]);
    for (uint32_t page = 0; page * KVS_PAGE_SLOTS < n_slots; page++) {
        const uint64_t live = kvs_attn_row_mask(job, page, job->n_rows - 1);
        for (uint32_t t = 0, run; t < TILES; t += run + 1) { /* runs of tiles that hold a live slot */
            for (run = 0; t + run < TILES && (live >> (t + run) * KVS_TILE_SLOTS & 0xffffu); run++)
                ;
            if (!run)
                continue;
            const uint32_t begin = t * KVS_TILE_SLOTS, end = begin + run * KVS_TILE_SLOTS;
            weights(&sc, scores + (size_t)page * KVS_PAGE_SLOTS, score_stride, n_query, begin, end,
                    record ? record + (size_t)page * KVS_PAGE_SLOTS : NULL, job->weights_stride);
            output_run(job, &sc, page, begin, end, dim_begin, dim_end);
        }
    }
    write_output(job, &sc, dim_begin, dim_end);
}

static void attend(const kvs_attn_job *job, void *scratch)
{
    const kvs_attn_scratch sc = kvs_attn_scratch_split(job, scratch);
    attend_scores(job, 0, kvs_attn_n_slots(job), sc.scores, sc.score_stride, sc.m);
    attend_output(job, sc.scores, sc.score_stride, sc.m, 0, job->head_dim, scratch);
    if (job->m)
        memcpy(job->m, sc.m, (size_t)job->n_rows * job->group * sizeof *job->m);
}

/* ---- tap ---- */

/* One tile of slots, all rows ascending. inv: 1 / l of each query. What tap lacks is known where this is called. */
INLINE void tap_tile(const kvs_attn_job *job, const kvs_attn_tap *tap, const float *inv, uint32_t page, uint32_t first,
                     uint32_t live, const bool sums, const bool emas, const bool maxima)
{
    const vf zero = vf_set1(0.0f), keep = vf_set1(1.0f - tap->ema_decay), decay = vf_set1(tap->ema_decay);
    vf sum[TILE_VECS], ema[TILE_VECS], max[TILE_VECS];
    UNROLL for (int v = 0; v < TILE_VECS; v++) {
        const uint32_t s = first + (uint32_t)v * VF_LANES;
        sum[v] = sums ? vf_load(tap->sum[page] + s) : zero;
        ema[v] = emas ? vf_load(tap->ema[page] + s) : zero;
        max[v] = maxima ? vf_load(tap->max[page] + s) : zero;
    }
    const float *const w = job->weights + (size_t)page * KVS_PAGE_SLOTS + first;
    for (uint32_t row = tap->row_begin; row < job->n_rows; row++) {
        vf a[TILE_VECS];
        UNROLL for (int v = 0; v < TILE_VECS; v++)
            a[v] = zero;
        for (uint32_t j = row * job->group; j < (row + 1) * job->group; j++)
            UNROLL for (int v = 0; v < TILE_VECS; v++) {
                const vf p = vf_mul(vf_load(w + j * job->weights_stride + v * VF_LANES), vf_set1(inv[j]));
                a[v] = vf_add(a[v], p);
                max[v] = maxima ? vf_max(p, max[v]) : zero;
            }
        UNROLL for (int v = 0; v < TILE_VECS; v++) {
            sum[v] = vf_add(sum[v], a[v]);
            ema[v] = emas ? vf_fma(keep, ema[v], vf_mul(decay, a[v])) : zero;
        }
    }
    UNROLL for (int v = 0; v < TILE_VECS; v++) {
        const uint32_t s = first + (uint32_t)v * VF_LANES;
        const vm lives = vm_from_bits(live >> v * VF_LANES);
        if (sums)
            vf_store(tap->sum[page] + s, vf_select(lives, sum[v], vf_load(tap->sum[page] + s)));
        if (emas)
            vf_store(tap->ema[page] + s, vf_select(lives, ema[v], vf_load(tap->ema[page] + s)));
        if (maxima)
            vf_store(tap->max[page] + s, vf_select(lives, max[v], vf_load(tap->max[page] + s)));
    }
}

static void attend_tap(const kvs_attn_job *job, const kvs_attn_tap *tap, void *scratch)
{
    const kvs_attn_scratch sc = kvs_attn_scratch_split(job, scratch);
    float *const inv = sc.sub;
    for (uint32_t j = tap->row_begin * job->group; j < job->n_rows * job->group; j++)
        inv[j] = job->l[j] == 0.0f ? 0.0f : 1.0f / job->l[j];
    const bool sum_only = tap->sum && !tap->ema && !tap->max;
    for (uint32_t page = 0; page * KVS_PAGE_SLOTS < kvs_attn_n_slots(job); page++) {
        const uint64_t live = kvs_attn_row_mask(job, page, job->n_rows - 1);
        for (uint32_t first = 0; first < KVS_PAGE_SLOTS; first += KVS_TILE_SLOTS) {
            const uint32_t lanes = (uint32_t)(live >> first) & 0xffffu;
            if (lanes && sum_only)
                tap_tile(job, tap, inv, page, first, lanes, true, false, false);
            else if (lanes)
                tap_tile(job, tap, inv, page, first, lanes, tap->sum, tap->ema, tap->max);
        }
    }
}

void VF_NAME(kvs_attention_fill)(kvs_kernels *k)
{
    k->attend = attend;
    k->attend_scores = attend_scores;
    k->attend_output = attend_output;
    k->attend_tap = attend_tap;
}
