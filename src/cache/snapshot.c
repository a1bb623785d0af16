/* A cache as bytes: live slots only, head by head, little-endian, so that a file does not depend on budget, pages or
 * compiler. Kernels give the same bits for dense and scattered slots, hence a restored cache goes on exactly. */
#include "cache/cache_internal.h"

#include <string.h>

#define SNAPSHOT_MAGIC 0x3143564bu /* "KVC1" */

typedef struct writer {
    uint8_t *at;
} writer;

static void put_u32(writer *w, uint32_t x)
{
    for (int i = 0; i < 4; i++)
        *w->at++ = (uint8_t)(x >> (8 * i));
}

static void put_u64(writer *w, uint64_t x)
{
    put_u32(w, (uint32_t)x);
    put_u32(w, (uint32_t)(x >> 32));
}

static void put_f32(writer *w, float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    put_u32(w, u);
}

typedef struct reader {
    const uint8_t *at, *end;
} reader;

static bool has(const reader *r, size_t n)
{
    return (size_t)(r->end - r->at) >= n;
}

static uint32_t get_u32(reader *r)
{
    const uint8_t *p = r->at;
    r->at += 4;
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t get_u64(reader *r)
{
    const uint64_t low = get_u32(r);
    return low | (uint64_t)get_u32(r) << 32;
}

static float get_f32(reader *r)
{
    const uint32_t u = get_u32(r);
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static uint32_t side_count(const kvs_cache *c)
{
    return (uint32_t)__builtin_popcount(c->config.side_mask);
}

static size_t slot_bytes(const kvs_cache *c)
{
    return 16 + 4 * (size_t)side_count(c) + 2 * (size_t)c->config.head_dim * (c->config.kv_f32 ? 4 : 2);
}

enum { HEADER_BYTES = 4 * 7 + 8 * 8, HEAD_BYTES = 4 + 4 + 4 + 8 };

size_t kvs_cache_snapshot_bytes(const kvs_cache *c)
{
    return HEADER_BYTES + (size_t)c->n_heads * HEAD_BYTES + (size_t)c->n_live_total * slot_bytes(c);
}

static void put_halves(writer *w, const float *x, uint32_t n, bool f32)
{
    /* f16 -> f32 -> f16 is exact, so going through kvs_page_read loses nothing. */
    if (f32) {
        for (uint32_t i = 0; i < n; i++)
            put_f32(w, x[i]);
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint16_t h;
        kvs_kernels_get(0)->f32_to_f16(&h, &x[i], 1);
        *w->at++ = (uint8_t)h;
        *w->at++ = (uint8_t)(h >> 8);
    }
}

static void get_halves(reader *r, float *x, uint32_t n, bool f32)
{
    if (f32) {
        for (uint32_t i = 0; i < n; i++)
            x[i] = get_f32(r);
        return;
    }
    for (uint32_t i = 0; i < n; i++, r->at += 2) {
        const uint16_t h = (uint16_t)(r->at[0] | r->at[1] << 8);
        kvs_kernels_get(0)->f16_to_f32(&x[i], &h, 1);
    }
}

static void write_head(const kvs_cache *c, const kvs_head *h, writer *w)
{
    float key[KVS_HEAD_DIM_MAX], value[KVS_HEAD_DIM_MAX];
    const uint32_t dh = c->config.head_dim;
    put_u32(w, h->n_live);
    put_u32(w, (uint32_t)h->next_rope);
    put_u32(w, (uint32_t)h->last_rope);
    put_u64(w, h->backward);
    for (uint32_t e = h->first; e != KVS_NO_PAGE; e = c->pages[e].next)
        for (uint64_t bits = c->pages[e].live; bits != 0; bits &= bits - 1) {
            const uint32_t s = (uint32_t)__builtin_ctzll(bits);
            const kvs_page_meta *m = &c->meta[e];
            put_u32(w, (uint32_t)m->pos[s]);
            put_u32(w, (uint32_t)m->rope_pos[s]);
            put_u32(w, (uint32_t)m->key_rot[s]);
            put_u32(w, m->token[s]);
            for (int k = 0; k < KVS_SIDE_COUNT; k++)
                if (c->side[k] != NULL)
                    put_f32(w, c->side[k][(size_t)e * KVS_PAGE_SLOTS + s]);
            kvs_page_read(kvs_page_keys(c, &c->pages[e]), kvs_page_values(c, &c->pages[e]), s, key, value, dh,
                          c->config.kv_f32);
            put_halves(w, key, dh, c->config.kv_f32);
            put_halves(w, value, dh, c->config.kv_f32);
        }
}

void kvs_cache_snapshot_write(const kvs_cache *c, uint8_t *buf)
{
    writer w = {buf};
    const kvs_cache_config *g = &c->config;
    const uint32_t shape[] = {SNAPSHOT_MAGIC, g->n_layers, g->n_kv_heads, g->head_dim, g->kv_f32, g->side_mask, 0};
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        put_u32(&w, shape[i]);
    const kvs_cache_meter *m = &c->meter;
    const uint64_t counters[] = {m->live_bytes_peak, m->reserved_bytes_peak, m->side_bytes_peak, m->kv_bytes_peak,
                                 m->footprint_slots, m->n_compactions,       m->n_slots_moved,   m->n_pages_copied};
    for (size_t i = 0; i < sizeof counters / sizeof *counters; i++)
        put_u64(&w, counters[i]);
    for (uint32_t h = 0; h < c->n_heads; h++)
        write_head(c, &c->heads[h], &w);
}

/* Blocks that dropping every page would free. */
static uint64_t n_exclusive(const kvs_cache *c)
{
    uint64_t n = 0;
    for (uint32_t h = 0; h < c->n_heads; h++)
        for (uint32_t e = c->heads[h].first; e != KVS_NO_PAGE; e = c->pages[e].next)
            n += !kvs_block_is_shared(c->store, &c->pages[e]);
    return n;
}

/* Walks the whole of buf without changing anything: shape, counts, order, length. */
/* In every mode a key stands, and was written, at or below its true position. */
static bool slot_is_possible(reader slot, const kvs_snapshot_limits *l)
{
    const int32_t pos = (int32_t)get_u32(&slot), rope = (int32_t)get_u32(&slot), rot = (int32_t)get_u32(&slot);
    const uint32_t token = get_u32(&slot) & 0xffffffu;
    return pos < l->pos_end && rope >= 0 && rope <= pos && rot >= 0 && rot <= pos && token < l->vocab_size;
}

static kvs_status check_snapshot(const kvs_cache *c, reader r, const kvs_snapshot_limits *limits, kvs_error *err)
{
    const kvs_cache_config *g = &c->config;
    if (!has(&r, HEADER_BYTES))
        return kvs_error_set(err, KVS_EFORMAT, "cache snapshot is shorter than its header");
    static const char *const names[] = {"magic", "layers", "KV heads", "head dim", "KV type", "accumulators"};
    const uint32_t shape[] = {SNAPSHOT_MAGIC, g->n_layers, g->n_kv_heads, g->head_dim, g->kv_f32, g->side_mask};
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
        const uint32_t got = get_u32(&r);
        if (got != shape[i])
            return kvs_error_set(err, KVS_EFORMAT, "cache snapshot: %s is %u, this session has %u", names[i], got,
                                 shape[i]);
    }
    r.at += 4 + 8 * 8;
    uint64_t pages = 0;
    for (uint32_t h = 0; h < c->n_heads; h++) {
        if (!has(&r, HEAD_BYTES))
            return kvs_error_set(err, KVS_EFORMAT, "cache snapshot ends in head %u of %u", h, c->n_heads);
        const uint32_t n = get_u32(&r);
        const int32_t next_rope = (int32_t)get_u32(&r);
        r.at += HEAD_BYTES - 8;
        if (limits != NULL && n > limits->slots_max)
            return kvs_error_set(err, KVS_EBUDGET, "cache snapshot holds %u slots in a head, this session %u at most",
                                 n, limits->slots_max);
        if (limits != NULL && (next_rope < 0 || next_rope > limits->pos_end))
            return kvs_error_set(err, KVS_EFORMAT, "cache snapshot is damaged: the next position of head %u is %d", h,
                                 next_rope);
        if (n > c->slot_cap)
            return kvs_error_set(err, KVS_EBUDGET, "cache snapshot holds %u slots in a head, the budget %u", n,
                                 c->slot_cap);
        if (!has(&r, n * slot_bytes(c)))
            return kvs_error_set(err, KVS_EFORMAT, "cache snapshot ends in head %u of %u", h, c->n_heads);
        int32_t last = -1;
        for (uint32_t i = 0; i < n; i++) {
            reader slot = {r.at + i * slot_bytes(c), r.end};
            const int32_t pos = (int32_t)get_u32(&slot);
            if (pos <= last)
                return kvs_error_set(err, KVS_EFORMAT, "cache snapshot: pos %d follows %d in head %u", pos, last, h);
            last = pos;
            slot.at -= 4;
            if (limits != NULL && !slot_is_possible(slot, limits))
                return kvs_error_set(err, KVS_EFORMAT,
                                     "cache snapshot is damaged: slot %u of head %u holds a token or a "
                                     "position that cannot be",
                                     i, h);
        }
        r.at += n * slot_bytes(c);
        pages += ((uint64_t)n + KVS_PAGE_SLOTS - 1) / KVS_PAGE_SLOTS;
    }
    if (pages > c->page_limit)
        return kvs_error_set(err, KVS_EBUDGET, "cache snapshot needs %llu pages, the budget has %u",
                             (unsigned long long)pages, c->page_limit);
    if (r.at != r.end)
        return kvs_error_set(err, KVS_EFORMAT, "cache snapshot: %zu bytes follow the last head",
                             (size_t)(r.end - r.at));
    if (kvs_block_n_free(c->store) + n_exclusive(c) < pages)
        return kvs_error_set(err, KVS_EBUDGET, "a fork onto a smaller budget holds pages that the snapshot needs");
    return KVS_OK;
}

static void read_head(kvs_cache *c, kvs_head *h, reader *r)
{
    float key[KVS_HEAD_DIM_MAX], value[KVS_HEAD_DIM_MAX];
    const uint32_t dh = c->config.head_dim;
    h->n_live = h->n_physical = get_u32(r);
    h->next_rope = (int32_t)get_u32(r);
    h->last_rope = (int32_t)get_u32(r);
    h->backward = get_u64(r);
    for (uint32_t i = 0; i < h->n_live; i++) {
        const uint32_t s = i % KVS_PAGE_SLOTS;
        if (s == 0)
            kvs_cache_chain_push(c, h, kvs_cache_entry_take(c));
        kvs_page *p = &c->pages[h->last];
        kvs_page_meta *m = &c->meta[h->last];
        m->pos[s] = (int32_t)get_u32(r);
        m->rope_pos[s] = (int32_t)get_u32(r);
        m->key_rot[s] = (int32_t)get_u32(r);
        m->token[s] = get_u32(r);
        for (int k = 0; k < KVS_SIDE_COUNT; k++)
            if (c->side[k] != NULL)
                c->side[k][(size_t)h->last * KVS_PAGE_SLOTS + s] = get_f32(r);
        get_halves(r, key, dh, c->config.kv_f32);
        get_halves(r, value, dh, c->config.kv_f32);
        kvs_page_write(kvs_page_keys(c, p), kvs_page_values(c, p), s, key, value, dh, c->config.kv_f32);
        p->live |= (uint64_t)1 << s;
        p->rotated |= m->rope_pos[s] != m->key_rot[s];
    }
}

kvs_status kvs_cache_snapshot_read(kvs_cache *c, const uint8_t *buf, size_t n_bytes, const kvs_snapshot_limits *limits,
                                   kvs_error *err)
{
    reader r = {buf, buf + n_bytes};
    KVS_TRY(check_snapshot(c, r, limits, err));
    kvs_cache_clear(c);
    r.at += 4 * 7;
    kvs_cache_meter *m = &c->meter;
    uint64_t *counters[] = {&m->live_bytes_peak, &m->reserved_bytes_peak, &m->side_bytes_peak, &m->kv_bytes_peak,
                            &m->footprint_slots, &m->n_compactions,       &m->n_slots_moved,   &m->n_pages_copied};
    for (size_t i = 0; i < sizeof counters / sizeof *counters; i++)
        *counters[i] = get_u64(&r);
    for (int i = 0; i < 4; i++) /* peaks under a larger budget are not this cache's */
        if (*counters[i] > m->budget_bytes)
            *counters[0] = *counters[1] = *counters[2] = *counters[3] = 0;
    for (uint32_t h = 0; h < c->n_heads; h++) {
        read_head(c, &c->heads[h], &r);
        c->n_live_total += c->heads[h].n_live;
    }
    kvs_cache_meter_update(c);
    return KVS_OK;
}
