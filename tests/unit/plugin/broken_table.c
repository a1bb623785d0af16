/* A plug-in whose table is wrong in the one way that BROKEN_<WAY>, from cmake/tests.cmake, says; tests/unit/test_plugin.c
 * loads one object of each. */
#include <kvasir_policy.h>
#include <math.h>
#include <stddef.h>

static void score(const double *params, const kvs_policy_view *view, float *scores)
{
    (void)params;
    for (uint32_t i = 0; i < view->n_slots; i++)
        scores[i] = 0;
}

#if defined(BROKEN_DEFAULT_NAN)
#define DEFAULT NAN
#elif defined(BROKEN_DEFAULT)
#define DEFAULT 7
#else
#define DEFAULT 1
#endif

static const kvs_param_info params_info[16] = {
#if defined(BROKEN_LONG_SPEC)
#define LONG(x)                                                                                                        \
    {                                                                                                                  \
        "a_name_that_is_longer_than_anybody_would_type_" x, "", 1, 0, 2                                                \
    }
    LONG("a"), LONG("b"), LONG("c"), LONG("d"), LONG("e"), LONG("f"), LONG("g"), LONG("h"), LONG("i"), LONG("j"),
#elif defined(BROKEN_PARAM_NAME)
    {"two words", "", 1, 0, 2},
#elif defined(BROKEN_PARAM_KEEP)
    {"keep", "", 1, 0, 2},
#elif defined(BROKEN_PARAM_TWICE)
    {"a", "", 1, 0, 2},
    {"a", "", 1, 0, 2},
#elif defined(BROKEN_RANGE)
    {"a", "", 1, 2, 0},
#else
    {"a", "", DEFAULT, 0, 2},
#endif
};

static const kvs_policy_ops broken = {
#if defined(BROKEN_ABI)
    .abi = KVS_POLICY_ABI + 1,
#else
    .abi = KVS_POLICY_ABI,
#endif
#if defined(BROKEN_NAME)
    .name = "No Name",
#elif defined(BROKEN_TAKEN)
    .name = "streaming",
#elif !defined(BROKEN_NO_NAME)
    .name = "broken_table",
#endif
#if !defined(BROKEN_NO_DOC)
    .doc = "",
#endif
    .source = "",
    .exactness = "",
#if defined(BROKEN_SCHEDULE)
    .schedule = "ful",
#else
    .schedule = "full",
#endif
    .position = "keep",
#if defined(BROKEN_SCOPE)
    .scope = (kvs_policy_scope)3,
#endif
#if defined(BROKEN_NEEDS)
    .needs = KVS_POLICY_NEEDS_END,
#elif defined(BROKEN_WINDOW)
    .needs = KVS_POLICY_NEEDS_WINDOW,
#endif
#if defined(BROKEN_NO_PARAMS)
    .params = sizeof params_info == 0 ? params_info : NULL,
#else
    .params = params_info,
#endif
#if defined(BROKEN_PARAM_COUNT)
    .n_params = 16,
#elif defined(BROKEN_LONG_SPEC)
    .n_params = 10,
#elif defined(BROKEN_PARAM_TWICE)
    .n_params = 2,
#else
    .n_params = 1,
#endif
#if defined(BROKEN_NO_SCORE)
    .score = sizeof params_info == 0 ? score : NULL,
#else
    .score = score,
#endif
};

#if defined(BROKEN_NO_ENTRY)
extern const kvs_policy_ops *const unused;
const kvs_policy_ops *const unused = &broken;
#else
const kvs_policy_ops *kvs_policy_plugin(uint32_t index)
{
#if defined(BROKEN_EMPTY)
    return index == UINT32_MAX ? &broken : NULL;
#elif defined(BROKEN_SAME_TWICE)
    return index < 2 ? &broken : NULL;
#elif defined(BROKEN_ENDLESS)
    /* Names that differ, without end. */
    static char names[256][8];
    static kvs_policy_ops many[256];
    many[index & 255] = broken;
    many[index & 255].name = names[index & 255];
    names[index & 255][0] = 'n';
    names[index & 255][1] = (char)('a' + (index >> 4 & 15));
    names[index & 255][2] = (char)('a' + (index & 15));
    return &many[index & 255];
#else
    return index == 0 ? &broken : NULL;
#endif
}
#endif
