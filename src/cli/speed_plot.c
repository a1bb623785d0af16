/* The picture of `kvasir speed`: two panels, decode and prefill, each with its rate and its bound against depth.
 *
 * One SVG file that needs nothing else; its colours follow the reader's light or dark setting, and what differs in
 * colour differs in shape too (points and a line; dashes). Between two depths the bound is drawn where it truly is: the
 * time of a token, not its rate, is linear in depth.
 */
#include "cli/cli.h"

#include <errno.h>
#include <math.h>
#include <string.h>

enum {
    WIDTH = 880,
    HEIGHT = 420,
    LEFT = 62,
    TOP = 112,
    PANEL_W = 350,
    PANEL_H = 244,
    PANEL_STEP = 436,
    BOUND_STEPS = 24
};

typedef struct curve {
    const char *heading, *bound_text;
    double rate[KVS_CLI_LIST_MAX], bound[KVS_CLI_LIST_MAX];
} curve;

typedef struct axes {
    double x0, depth_min, depth_max, rate_max, rate_step;
    bool log_depth;
} axes;

static const char style[] =
    "<style>\n"
    "svg { --paper: #ffffff; --ink: #1b2126; --soft: #56616b; --grid: #e3e7ea; --rate: #0072b2; --bound: #d55e00; }\n"
    "@media (prefers-color-scheme: dark) {\n"
    "  svg { --paper: #191e22; --ink: #e6eaed; --soft: #a7b1ba; --grid: #2d353c; --rate: #56b4e9; --bound: #f47b33; }\n"
    "}\n"
    "text { font: 12px system-ui, 'Segoe UI', Roboto, 'Noto Sans', sans-serif; fill: var(--soft); }\n"
    "text.head { font-size: 14px; font-weight: 600; fill: var(--ink); }\n"
    "text.value { fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }\n"
    ".grid { stroke: var(--grid); }\n"
    ".rate { stroke: var(--rate); stroke-width: 2; fill: none; }\n"
    ".dot { fill: var(--rate); }\n"
    ".bound { stroke: var(--bound); stroke-width: 2; stroke-dasharray: 6 4; fill: none; }\n"
    "</style>\n";

static void put_escaped(FILE *f, const char *text)
{
    for (; *text != '\0'; text++) {
        if (*text == '<')
            fputs("&lt;", f);
        else if (*text == '&')
            fputs("&amp;", f);
        else if ((unsigned char)*text >= ' ')
            fputc(*text, f);
    }
}

/* 1234.5 as "1,234", 12.34 as "12.3". */
static const char *number(double x, char text[32])
{
    if (x < 99.95)
        snprintf(text, 32, "%.3g", x);
    else if (x < 999.5)
        snprintf(text, 32, "%.0f", x);
    else
        snprintf(text, 32, "%.0f,%03.0f", floor(round(x) / 1000), fmod(round(x), 1000));
    return text;
}

static double x_of(const axes *a, double depth)
{
    if (a->depth_max <= a->depth_min)
        return a->x0 + PANEL_W / 2.0;
    const double share = a->log_depth ? log(depth / a->depth_min) / log(a->depth_max / a->depth_min)
                                      : (depth - a->depth_min) / (a->depth_max - a->depth_min);
    return a->x0 + 16 + share * (PANEL_W - 32);
}

static double y_of(const axes *a, double rate)
{
    return TOP + PANEL_H * (1 - rate / a->rate_max);
}

static axes make_axes(const kvs_cli_speed_row *rows, uint32_t n, const curve *c, uint32_t panel)
{
    axes a = {.x0 = LEFT + panel * PANEL_STEP, .depth_min = rows[0].depth, .depth_max = rows[0].depth};
    double top = 1e-3;
    for (uint32_t i = 0; i < n; i++) {
        a.depth_min = fmin(a.depth_min, rows[i].depth);
        a.depth_max = fmax(a.depth_max, rows[i].depth);
        top = fmax(top, fmax(c->rate[i], c->bound[i]));
    }
    a.log_depth = a.depth_max >= 4 * a.depth_min;
    static const double steps[] = {1, 2, 2.5, 5, 10};
    const double rough = top / 5, power = pow(10, floor(log10(rough)));
    for (size_t i = 0; i < 5 && a.rate_step < rough; i++)
        a.rate_step = steps[i] * power;
    a.rate_max = ceil(top * 1.04 / a.rate_step) * a.rate_step;
    return a;
}

static void draw_axes(FILE *f, const axes *a, const kvs_cli_speed_row *rows, uint32_t n, const curve *c)
{
    char text[32];
    fprintf(f, "<text class=\"head\" x=\"%g\" y=\"%d\">%s</text>\n", a->x0, TOP - 40, c->heading);
    fprintf(f, "<line class=\"rate\" x1=\"%g\" y1=\"%d\" x2=\"%g\" y2=\"%d\"/>", a->x0, TOP - 22, a->x0 + 22, TOP - 22);
    fprintf(f, "<circle class=\"dot\" cx=\"%g\" cy=\"%d\" r=\"4\"/>", a->x0 + 11, TOP - 22);
    fprintf(f, "<text x=\"%g\" y=\"%d\">measured</text>\n", a->x0 + 28, TOP - 18);
    fprintf(f, "<line class=\"bound\" x1=\"%g\" y1=\"%d\" x2=\"%g\" y2=\"%d\"/>", a->x0 + 96, TOP - 22, a->x0 + 122,
            TOP - 22);
    fprintf(f, "<text x=\"%g\" y=\"%d\">%s</text>\n", a->x0 + 128, TOP - 18, c->bound_text);
    const int n_steps = (int)lround(a->rate_max / a->rate_step);
    for (int i = 0; i <= n_steps; i++) {
        const double rate = i * a->rate_step;
        fprintf(f, "<line class=\"grid\" x1=\"%g\" y1=\"%.1f\" x2=\"%g\" y2=\"%.1f\"/>", a->x0, y_of(a, rate),
                a->x0 + PANEL_W, y_of(a, rate));
        fprintf(f, "<text x=\"%g\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n", a->x0 - 8, y_of(a, rate) + 4,
                number(rate, text));
    }
    double last = -1e9; /* ascending or not, a label that would touch the one before is left out */
    for (uint32_t i = 0; i < n; i++) {
        const double x = x_of(a, rows[i].depth);
        if (fabs(x - last) < 40)
            continue;
        last = x;
        fprintf(f, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", x, TOP + PANEL_H + 20,
                number(rows[i].depth, text));
    }
    fprintf(f, "<text x=\"%g\" y=\"%d\" text-anchor=\"middle\">depth, tokens</text>\n", a->x0 + PANEL_W / 2.0,
            TOP + PANEL_H + 42);
}

static void draw_bound(FILE *f, const axes *a, const kvs_cli_speed_row *rows, uint32_t n, const curve *c)
{
    fputs("<path class=\"bound\" d=\"", f);
    if (n == 1)
        fprintf(f, "M%.1f %.1fh60", x_of(a, rows[0].depth) - 30, y_of(a, c->bound[0]));
    for (uint32_t i = 0; i + 1 < n; i++)
        for (int k = 0; k <= BOUND_STEPS; k++) {
            const double share = (double)k / BOUND_STEPS;
            const double depth = rows[i].depth + share * ((double)rows[i + 1].depth - rows[i].depth);
            const double token_s = (1 - share) / c->bound[i] + share / c->bound[i + 1];
            fprintf(f, "%c%.1f %.1f", i == 0 && k == 0 ? 'M' : 'L', x_of(a, depth), y_of(a, 1 / token_s));
        }
    fputs("\"/>\n", f);
}

static void draw_rates(FILE *f, const axes *a, const kvs_cli_speed_row *rows, uint32_t n, const curve *c)
{
    char text[32];
    fputs("<path class=\"rate\" d=\"", f);
    for (uint32_t i = 0; i < n; i++)
        fprintf(f, "%c%.1f %.1f", i == 0 ? 'M' : 'L', x_of(a, rows[i].depth), y_of(a, c->rate[i]));
    fputs("\"/>\n", f);
    double last = -1e9;
    for (uint32_t i = 0; i < n; i++) {
        const double x = x_of(a, rows[i].depth), y = y_of(a, c->rate[i]);
        fprintf(f, "<circle class=\"dot\" cx=\"%.1f\" cy=\"%.1f\" r=\"4\"><title>%u tokens: %.1f tok/s, at most %.1f",
                x, y, rows[i].depth, c->rate[i], c->bound[i]);
        fputs("</title></circle>\n", f);
        if (fabs(x - last) < 40)
            continue;
        last = x;
        const bool below = fabs(y - 14 - y_of(a, c->bound[i])) < 14; /* the bound's line would cross it above */
        fprintf(f, "<text class=\"value\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%s</text>\n", x,
                below ? y + 20 : y - 9, number(c->rate[i], text));
    }
}

static void draw(FILE *f, const char *title, const char *limits, const kvs_cli_speed_row *rows, uint32_t n)
{
    curve curves[2] = {{.heading = "Decode, tokens a second", .bound_text = "bound: reads at full bandwidth"},
                       {.heading = "Prefill, tokens a second", .bound_text = "bound: arithmetic at its peak"}};
    for (uint32_t i = 0; i < n; i++) {
        curves[0].rate[i] = rows[i].decode_tok_per_s;
        curves[0].bound[i] = rows[i].decode_bound_tok_per_s;
        curves[1].rate[i] = rows[i].prefill_tok_per_s;
        curves[1].bound[i] = rows[i].prefill_bound_tok_per_s;
    }
    fprintf(
        f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" role=\"img\">\n",
        WIDTH, HEIGHT, WIDTH, HEIGHT);
    fputs("<title>Speed against depth: ", f);
    put_escaped(f, title);
    fprintf(f, "</title>\n%s<rect width=\"%d\" height=\"%d\" style=\"fill: var(--paper)\"/>\n", style, WIDTH, HEIGHT);
    fprintf(f, "<text x=\"%d\" y=\"26\">", LEFT);
    put_escaped(f, title);
    fprintf(f, "</text>\n<text x=\"%d\" y=\"44\">the machine %s</text>\n", LEFT, limits);
    for (uint32_t panel = 0; panel < 2; panel++) {
        const axes a = make_axes(rows, n, &curves[panel], panel);
        draw_axes(f, &a, rows, n, &curves[panel]);
        draw_bound(f, &a, rows, n, &curves[panel]);
        draw_rates(f, &a, rows, n, &curves[panel]);
    }
    fputs("</svg>\n", f);
}

kvs_status kvs_cli_speed_plot(const char *path, const char *title, const char *limits, const kvs_cli_speed_row *rows,
                              uint32_t n_rows, kvs_error *err)
{
    FILE *const f = fopen(path, "w");
    if (f == NULL)
        return kvs_error_set(err, KVS_EIO, "cannot write %s: %s", path, strerror(errno));
    draw(f, title, limits, rows, n_rows);
    const bool failed = ferror(f) != 0;
    if (fclose(f) != 0 || failed)
        return kvs_error_set(err, KVS_EIO, "cannot write %s: %s", path, strerror(errno));
    return KVS_OK;
}
