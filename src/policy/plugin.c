/* Presets from shared objects: loaded once, checked member by member, then as good as built in. Nothing of a preset is
 * read before its abi number says that it has the layout of this build. */
#include "policy/policy.h"

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

/* A plug-in of another layout must have another number. Whoever changes a struct meets this line: raise KVS_POLICY_ABI if
 * a release has it, then write the new sizes (of 64-bit machines) here. */
_Static_assert(sizeof(void *) != 8 || (sizeof(kvs_policy_ops) == 232 && sizeof(kvs_policy_view) == 304),
               "kvs_policy_ops or kvs_policy_view has another layout than KVS_POLICY_ABI says");

/* A fixed table, so that readers need no lock: an entry never changes once the count covers it. */
enum { PLUGIN_PRESETS_MAX = 64, NAME_CHARS_MAX = 48, PATH_CHARS_MAX = 4096 };

static const kvs_policy_ops *presets[PLUGIN_PRESETS_MAX];
static void *handles[PLUGIN_PRESETS_MAX]; /* of the files; each adds one preset at least */
static uint32_t n_handles;
static atomic_uint n_presets;
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;

uint32_t kvs_plugin_count(void)
{
    return atomic_load_explicit(&n_presets, memory_order_acquire);
}

const kvs_policy_ops *kvs_plugin_at(uint32_t index)
{
    return index < kvs_plugin_count() ? presets[index] : NULL;
}

/* ---- one preset ---- */

/* Which file and which of its presets, for messages. */
typedef struct place {
    const char *path;
    uint32_t index;
    kvs_error *err;
} place;

#define REFUSE(p, fmt, ...)                                                                                            \
    kvs_error_set((p)->err, KVS_EFORMAT, "%.160s: preset %u: " fmt, (p)->path, (p)->index, __VA_ARGS__)

/* Names are words of a spec, so none of its signs is in them. */
static bool is_name(const char *name)
{
    if (name == NULL)
        return false;
    const size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_-");
    return n <= NAME_CHARS_MAX && name[n] == '\0' && name[0] >= 'a' && name[0] <= 'z';
}

static kvs_status check_param(const place *at, const kvs_policy_ops *ops, uint32_t k)
{
    const kvs_param_info *q = &ops->params[k];
    if (!is_name(q->name))
        return REFUSE(at, "%s: parameter %u needs a name of 1 to %d letters a-z, digits, _ and -, a letter first",
                      ops->name, k, NAME_CHARS_MAX);
    if (strcmp(q->name, "keep") == 0)
        return REFUSE(at, "%s: parameter %u is named keep, which every preset has: set .keep instead", ops->name, k);
    for (uint32_t i = 0; i < k; i++)
        if (strcmp(ops->params[i].name, q->name) == 0)
            return REFUSE(at, "%s: parameters %u and %u are both named %s", ops->name, i, k, q->name);
    if (q->doc == NULL)
        return REFUSE(at, "%s: parameter %s has no doc", ops->name, q->name);
    if (!isfinite(q->min) || !isfinite(q->max) || q->min > q->max)
        return REFUSE(at, "%s: parameter %s has the range %g to %g; it must be finite and ascend", ops->name, q->name,
                      q->min, q->max);
    if (!(q->value >= q->min && q->value <= q->max))
        return REFUSE(at, "%s: parameter %s has the default %g outside its range %g to %g", ops->name, q->name,
                      q->value, q->min, q->max);
    return KVS_OK;
}

static kvs_status check_texts(const place *at, const kvs_policy_ops *ops)
{
    const struct {
        const char *member, *value;
    } texts[] = {{"doc", ops->doc},
                 {"source", ops->source},
                 {"exactness", ops->exactness},
                 {"schedule", ops->schedule},
                 {"position", ops->position}};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (texts[i].value == NULL)
            return REFUSE(at, "%s: .%s is NULL, it must be a text", ops->name, texts[i].member);
    return KVS_OK;
}

static kvs_status check_preset(const place *at, const kvs_policy_ops *ops)
{
    if (ops->abi != KVS_POLICY_ABI)
        return kvs_error_set(at->err, KVS_EUNSUPPORTED,
                             "%.160s: preset %u was built for policy ABI %u, this build has %u: build it again with "
                             "this build's kvasir_policy.h",
                             at->path, at->index, ops->abi, KVS_POLICY_ABI);
    if (!is_name(ops->name))
        return REFUSE(at, "it needs a .name of 1 to %d letters a-z, digits, _ and -, a letter first", NAME_CHARS_MAX);
    if (kvs_policy_find(ops->name) != NULL)
        return REFUSE(at, "the name %s is taken, by a built-in preset or a plug-in loaded before", ops->name);
    KVS_TRY(check_texts(at, ops));
    if (ops->score == NULL)
        return REFUSE(at, "%s: .score is NULL, every preset needs that function", ops->name);
    if (ops->n_params >= KVS_POLICY_PARAMS_MAX)
        return REFUSE(at, "%s: .n_params is %u, at most %d", ops->name, ops->n_params, KVS_POLICY_PARAMS_MAX - 1);
    if (ops->n_params > 0 && ops->params == NULL)
        return REFUSE(at, "%s: .n_params is %u and .params is NULL", ops->name, ops->n_params);
    for (uint32_t k = 0; k < ops->n_params; k++)
        KVS_TRY(check_param(at, ops, k));
    /* The rest is what a spec of its bare name would ask: stages, needs, scope; and its full text must be a spec. */
    kvs_policy p;
    kvs_error why = {.message = ""};
    if (kvs_policy_parse_tail(ops, "", NULL, false, &p, &why) != KVS_OK)
        return REFUSE(at, "%.240s", why.message);
    if (kvs_policy_parse_tail(ops, p.text + strlen(ops->name), NULL, false, &p, &why) != KVS_OK)
        return REFUSE(at, "%s: its full spec is none (%.160s): shorter parameter names help", ops->name, why.message);
    return KVS_OK;
}

/* ---- one file ---- */

/* The file's presets behind the first n_old; *n becomes how many there are then. The count does not cover them yet. */
static kvs_status read_presets(const char *path, void *handle, uint32_t n_old, uint32_t *n, kvs_error *err)
{
    const kvs_policy_ops *(*plugin)(uint32_t);
    void *const symbol = dlsym(handle, "kvs_policy_plugin");
    if (symbol == NULL)
        return kvs_error_set(err, KVS_EFORMAT, "%.160s exports no kvs_policy_plugin, as kvasir_policy.h declares it",
                             path);
    memcpy(&plugin, &symbol, sizeof plugin); /* what POSIX allows and ISO C has no cast for */
    const kvs_policy_ops *ops;
    for (*n = n_old; (ops = plugin(*n - n_old)) != NULL; ++*n) {
        const place at = {path, *n - n_old, err};
        if (*n == PLUGIN_PRESETS_MAX)
            return kvs_error_set(err, KVS_EFORMAT, "%.160s: preset %u is one more than the %d that plug-ins may add",
                                 path, at.index, PLUGIN_PRESETS_MAX);
        KVS_TRY(check_preset(&at, ops));
        for (uint32_t i = n_old; i < *n; i++)
            if (strcmp(presets[i]->name, ops->name) == 0)
                return REFUSE(&at, "the name %s is that of preset %u too", ops->name, i - n_old);
        presets[*n] = ops;
    }
    if (*n == n_old)
        return kvs_error_set(err, KVS_EFORMAT, "%.160s holds no preset: kvs_policy_plugin(0) is NULL", path);
    return KVS_OK;
}

static kvs_status load(const char *path, kvs_error *err)
{
    char local[PATH_CHARS_MAX + 3];
    snprintf(local, sizeof local, "%s%s", strchr(path, '/') == NULL ? "./" : "", path);
    void *const handle = dlopen(local, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        const char *const why = dlerror();
        return kvs_error_set(err, KVS_EIO, "%.300s", why != NULL ? why : path);
    }
    for (uint32_t i = 0; i < n_handles; i++)
        if (handles[i] == handle) {
            dlclose(handle); /* one reference is enough */
            return KVS_OK;
        }
    const uint32_t n_old = kvs_plugin_count();
    uint32_t n;
    const kvs_status status = read_presets(path, handle, n_old, &n, err);
    if (status != KVS_OK) {
        dlclose(handle);
        return status;
    }
    handles[n_handles++] = handle;
    atomic_store_explicit(&n_presets, n, memory_order_release);
    return KVS_OK;
}

kvs_status kvs_policy_load_plugin(const char *path, kvs_error *err)
{
    if (path == NULL || path[0] == '\0' || strlen(path) > PATH_CHARS_MAX)
        return kvs_error_set(err, KVS_EINVAL, "a plug-in needs the path of a shared object, as ./my_policy.so%s",
                             path != NULL && path[0] != '\0' ? ", of at most 4096 characters" : "");
    pthread_mutex_lock(&loading);
    const kvs_status status = load(path, err);
    pthread_mutex_unlock(&loading);
    return status;
}
