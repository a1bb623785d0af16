/* Small text pictures of a session: what is held, what was lost, usage, health. */
#include "cli/cli.h"

#include <stdlib.h>
#include <string.h>

kvs_status kvs_cli_held_read(const kvs_model *m, const kvs_session *s, kvs_cli_held *out, kvs_error *err)
{
    kvs_model_info info;
    kvs_model_get_info(m, &info);
    *out = (kvs_cli_held){.n_tokens = kvs_session_n_tokens(s), .n_pairs = info.n_layers * info.n_kv_heads};
    out->n_heads = calloc(out->n_tokens + 1, sizeof *out->n_heads);
    int32_t *const pos = calloc(out->n_tokens + 1, sizeof *pos);
    if (out->n_heads == NULL || pos == NULL) {
        free(pos);
        kvs_cli_held_free(out);
        return kvs_error_set(err, KVS_ENOMEM, "no memory to list what the session holds");
    }
    for (uint32_t pair = 0; pair < out->n_pairs; pair++) {
        const uint32_t n =
            kvs_min_u32((uint32_t)out->n_tokens, kvs_session_keep_set(s, pair / info.n_kv_heads, pair % info.n_kv_heads,
                                                                      pos, NULL, (uint32_t)out->n_tokens));
        for (uint32_t i = 0; i < n; i++)
            if (pos[i] >= 0 && (uint64_t)pos[i] < out->n_tokens)
                out->n_heads[pos[i]]++;
    }
    free(pos);
    return KVS_OK;
}

void kvs_cli_held_free(kvs_cli_held *h)
{
    free(h->n_heads);
    *h = (kvs_cli_held){0};
}

uint64_t kvs_cli_held_lost(const kvs_cli_held *before, const kvs_cli_held *after, uint32_t cap_ranges, char *text,
                           size_t cap_bytes)
{
    uint64_t n_lost = 0;
    uint32_t n_ranges = 0;
    size_t used = 0;
    text[0] = '\0';
    for (uint64_t i = 0; i < after->n_tokens;) {
        uint64_t end = i;
        while (end < after->n_tokens && after->n_heads[end] == 0 &&
               (end >= before->n_tokens || before->n_heads[end] > 0))
            end++;
        if (end == i) {
            i++;
            continue;
        }
        n_lost += end - i;
        if (n_ranges < cap_ranges && used + 48 < cap_bytes) {
            const char *const comma = n_ranges > 0 ? ", " : "";
            used +=
                (size_t)(end - i == 1 ? snprintf(text + used, cap_bytes - used, "%s%llu", comma, (unsigned long long)i)
                                      : snprintf(text + used, cap_bytes - used, "%s%llu-%llu", comma,
                                                 (unsigned long long)i, (unsigned long long)(end - 1)));
        } else if (n_ranges == cap_ranges && used + 8 < cap_bytes) {
            used += (size_t)snprintf(text + used, cap_bytes - used, ", ...");
        }
        n_ranges++;
        i = end;
    }
    return n_lost;
}

enum { MAP_COLUMNS = 64, MAP_ROWS = 8 };

/* Tokens held per column by one layer, over its heads, as a share of all it heard there. */
static void map_row(const kvs_model_info *info, const kvs_session *s, uint32_t layer, uint64_t n_tokens, int32_t *pos,
                    char *row)
{
    static const char shades[] = " .:-=+*%#";
    uint32_t held[MAP_COLUMNS] = {0};
    for (uint32_t head = 0; head < info->n_kv_heads; head++) {
        const uint32_t n =
            kvs_min_u32((uint32_t)n_tokens, kvs_session_keep_set(s, layer, head, pos, NULL, (uint32_t)n_tokens));
        for (uint32_t i = 0; i < n; i++)
            if (pos[i] >= 0 && (uint64_t)pos[i] < n_tokens)
                held[(uint64_t)pos[i] * MAP_COLUMNS / n_tokens]++;
    }
    for (uint32_t c = 0; c < MAP_COLUMNS; c++) {
        /* tokens t with t * COLUMNS / n == c */
        const uint64_t begin = ((uint64_t)c * n_tokens + MAP_COLUMNS - 1) / MAP_COLUMNS;
        const uint64_t end = (((uint64_t)c + 1) * n_tokens + MAP_COLUMNS - 1) / MAP_COLUMNS;
        const uint64_t all = (end - begin) * info->n_kv_heads;
        const uint64_t shade = all == 0 ? 0 : (held[c] * (sizeof shades - 2) + all - 1) / all;
        row[c] = all == 0 && c > 0 ? row[c - 1] : shades[shade];
    }
    row[MAP_COLUMNS] = '\0';
}

void kvs_cli_print_keep_map(const kvs_model *m, const kvs_session *s, FILE *out)
{
    const uint64_t n_tokens = kvs_session_n_tokens(s);
    kvs_model_info info;
    kvs_model_get_info(m, &info);
    if (n_tokens == 0) {
        fprintf(out, "nothing has been said yet\n");
        return;
    }
    int32_t *const pos = calloc(n_tokens, sizeof *pos);
    if (pos == NULL) {
        fprintf(out, "no memory for the map\n");
        return;
    }
    fprintf(out, "what the cache holds of tokens 0 to %llu; # all heads, blank none\n",
            (unsigned long long)(n_tokens - 1));
    const uint32_t n_rows = kvs_min_u32(MAP_ROWS, info.n_layers);
    for (uint32_t r = 0; r < n_rows; r++) {
        const uint32_t layer = n_rows > 1 ? r * (info.n_layers - 1) / (n_rows - 1) : 0;
        char row[MAP_COLUMNS + 1];
        map_row(&info, s, layer, n_tokens, pos, row);
        fprintf(out, "  layer %3u |%s|\n", layer, row);
    }
    free(pos);
}

void kvs_cli_print_usage(const kvs_session *s, FILE *out)
{
    kvs_usage u;
    kvs_session_get_usage(s, &u);
    fprintf(out, "tokens said      %llu\n", (unsigned long long)kvs_session_n_tokens(s));
    fprintf(out, "slots a head     %u to %u (mean %.1f) of %llu\n", u.n_slots_min, u.n_slots_max, u.n_slots_mean,
            (unsigned long long)u.budget_tokens);
    fprintf(out, "cache            %.2f of %.2f MiB (peak %.2f): live %.2f, reserved %.2f, side %.2f\n",
            kvs_cli_mib(u.kv_bytes), kvs_cli_mib(u.budget_bytes), kvs_cli_mib(u.kv_bytes_peak),
            kvs_cli_mib(u.live_bytes), kvs_cli_mib(u.reserved_bytes), kvs_cli_mib(u.side_bytes));
    fprintf(out, "outside it       scratch %.2f MiB; process peak %.0f MiB\n", kvs_cli_mib(u.scratch_bytes),
            kvs_cli_mib(kvs_cli_peak_rss_bytes()));
    fprintf(out, "evictions        %llu, %llu slots, %.1f ms\n", (unsigned long long)u.n_evictions,
            (unsigned long long)u.n_slots_evicted, (double)u.evict_ns * 1e-6);
    fprintf(out, "footprint        %.3f of the full cache's\n", u.footprint);
    if (u.n_ffn_blocks > 0)
        fprintf(out, "ffn blocks       %llu of %llu left out (%.1f %%)\n", (unsigned long long)u.n_ffn_skipped,
                (unsigned long long)u.n_ffn_blocks, 100.0 * (double)u.n_ffn_skipped / (double)u.n_ffn_blocks);
}

void kvs_cli_print_health(const kvs_session *s, FILE *out)
{
    static const char *const alarms[] = {"keys in the future", "beyond the window", "positions step back",
                                         "budget passed", "NaN"};
    kvs_health h;
    kvs_positions p;
    kvs_session_get_health(s, &h);
    kvs_session_get_positions(s, &p);
    const char *const band = h.score >= 90 ? "good" : h.score >= 80 ? "fair" : h.score >= 60 ? "poor" : "bad";
    fprintf(out, "health %.1f (%s): predicted KL %.4f nats, largest term %s%s\n", h.score, band, h.predicted,
            h.worst != NULL && h.worst[0] != '\0' ? h.worst : "none", h.calibrated ? "" : "; weights are priors");
    for (uint32_t i = 0; i < 5; i++)
        if (h.alarms >> i & 1u)
            fprintf(out, "alarm: %s\n", alarms[i]);
    fprintf(out, "ldd %.4f  rddi %.4f  future %.4f  out_of_window %.4f  collision %.4f\n", p.ldd, p.rddi, p.future,
            p.out_of_window, p.collision);
    fprintf(out, "order %.4f  backward %.4f  gap %.4f  seam %.4f  prefix %.4f  template %.4f\n", p.order, p.backward,
            p.gap, p.seam, p.prefix, p.template_integrity);
}

void kvs_cli_set_ffn(json_t *object, const kvs_session *s)
{
    kvs_usage u;
    kvs_ffn_layer layer;
    if (!kvs_session_get_ffn(s, 0, &layer))
        return;
    kvs_session_get_usage(s, &u);
    kvs_cli_set_text(object, "ffn_skip", kvs_session_ffn_skip(s));
    kvs_cli_set_int(object, "ffn_blocks", u.n_ffn_blocks);
    kvs_cli_set_int(object, "ffn_skipped", u.n_ffn_skipped);
    kvs_cli_set_real(object, "ffn_skipped_share", (double)u.n_ffn_skipped / (double)u.n_ffn_blocks);
    json_t *const layers = json_array();
    for (uint32_t l = 0; kvs_session_get_ffn(s, l, &layer); l++) {
        json_t *const o = json_object();
        kvs_cli_set_int(o, "n_run", layer.n_run);
        kvs_cli_set_int(o, "n_skipped", layer.n_skipped);
        kvs_cli_set_real(o, "cosine", layer.cosine);
        json_array_append_new(layers, o);
    }
    json_object_set_new(object, "ffn_layers", layers);
}

void kvs_cli_set_state(json_t *object, const kvs_usage *u, const kvs_positions *p, const kvs_health *h)
{
    kvs_cli_set_real(object, "n_kept_mean", u->n_slots_mean);
    kvs_cli_set_real(object, "footprint", u->footprint);
    kvs_cli_set_int(object, "peak_kv_bytes", u->kv_bytes_peak);
    kvs_cli_set_int(object, "budget_bytes", u->budget_bytes);
    kvs_cli_set_int(object, "budget_tokens", u->budget_tokens);
    kvs_cli_set_int(object, "peak_rss_bytes", kvs_cli_peak_rss_bytes());
    kvs_cli_set_int(object, "evictions", u->n_evictions);
    kvs_cli_set_real(object, "evict_ms", (double)u->evict_ns * 1e-6);
    kvs_cli_set_real(object, "score_ms", (double)u->score_ns * 1e-6);
    kvs_cli_set_real(object, "select_ms", (double)u->select_ns * 1e-6);
    kvs_cli_set_real(object, "move_ms", (double)u->move_ns * 1e-6);
    kvs_cli_set_real(object, "probe_ms", (double)u->probe_ns * 1e-6);
    kvs_cli_set_int(object, "side_bytes", u->side_bytes_peak);
    kvs_cli_set_int(object, "own_bytes", u->own_bytes);
    kvs_cli_set_real(object, "health", h->score);
    kvs_cli_set_text(object, "health_worst", h->worst);
    kvs_cli_set_real(object, "ldd", p->ldd);
    kvs_cli_set_real(object, "rddi", p->rddi);
    kvs_cli_set_real(object, "future", p->future);
    kvs_cli_set_real(object, "out_of_window", p->out_of_window);
    kvs_cli_set_real(object, "collision", p->collision);
    kvs_cli_set_real(object, "order", p->order);
    kvs_cli_set_real(object, "backward", p->backward);
    kvs_cli_set_real(object, "gap", p->gap);
    kvs_cli_set_real(object, "seam", p->seam);
}
