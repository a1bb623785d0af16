/* Building the data block: JSON values with a sticky failure, so that a caller checks once at the end. */
#ifndef KVS_BENCH_REPORT_JSON_H
#define KVS_BENCH_REPORT_JSON_H

#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>

/* NaN and infinities have no JSON form. */
static inline json_t *num(double x)
{
    if (!isfinite(x))
        return json_null();
    return x == floor(x) && fabs(x) < 9e15 ? json_integer((json_int_t)x) : json_real(x);
}

/* Four digits: a curve has no more pixels, and there are tens of thousands of its points. */
static inline json_t *num_short(double x)
{
    if (!isfinite(x) || x == 0)
        return num(x);
    const double scale = pow(10, 3 - floor(log10(fabs(x))));
    return num(isfinite(scale) && scale > 0 ? nearbyint(x * scale) / scale : x);
}

static inline void push(json_t *array, json_t *v, bool *bad)
{
    if (json_array_append_new(array, v) != 0)
        *bad = true;
}

static inline void put(json_t *object, const char *key, json_t *v, bool *bad)
{
    if (json_object_set_new(object, key, v) != 0)
        *bad = true;
}

static inline json_t *names(const char *const *list, size_t n, bool *bad)
{
    json_t *out = json_array();
    for (size_t i = 0; i < n; i++)
        push(out, json_string(list[i]), bad);
    return out;
}

#endif
