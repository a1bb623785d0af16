/* K-means (k-means++ starts, Lloyd's steps), one thread and f64 throughout, so that the same vectors give the same groups
 * everywhere. As scikit-learn's KMeans(n_init=10), which EpiCache's repository calls (arXiv:2509.17396), except that the
 * starts come from another generator and each centre from one draw. */
#include "session/episodes.h"

#include <math.h>
#include <string.h>

enum { STARTS = 10, STEPS_MAX = 300, SEED = 42 /* the repository's random_state */ };

double kvs_vector_dot(const float *a, const float *b, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

bool kvs_vector_normalise(float *x, uint32_t n)
{
    const double length = sqrt(kvs_vector_dot(x, x, n));
    if (!(length > 0) || !isfinite(length))
        return false;
    for (uint32_t i = 0; i < n; i++)
        x[i] = (float)((double)x[i] / length);
    return true;
}

typedef struct kmeans {
    const float *x;
    uint32_t n, dim, k;
    double *centre;     /* [k][dim] */
    double *distance;   /* [n] squared, to the own centre */
    uint32_t *label;    /* [n] */
    uint32_t *n_member; /* [k] */
} kmeans;

static double squared_distance(const float *x, const double *c, uint32_t dim)
{
    double sum = 0;
    for (uint32_t i = 0; i < dim; i++) {
        const double d = (double)x[i] - c[i];
        sum += d * d;
    }
    return sum;
}

static void set_centre(kmeans *m, uint32_t c, uint32_t index)
{
    for (uint32_t i = 0; i < m->dim; i++)
        m->centre[(size_t)c * m->dim + i] = (double)m->x[(size_t)index * m->dim + i];
}

/* k-means++: each further centre is a vector drawn by its squared distance to those chosen. */
static void draw_centres(kmeans *m, uint64_t start)
{
    kvs_rng rng = {kvs_hash3(SEED, start, m->n)};
    set_centre(m, 0, kvs_rng_below(&rng, m->n));
    for (uint32_t i = 0; i < m->n; i++)
        m->distance[i] = (double)INFINITY;
    for (uint32_t c = 1; c < m->k; c++) {
        double total = 0;
        for (uint32_t i = 0; i < m->n; i++) {
            const double d = squared_distance(m->x + (size_t)i * m->dim, m->centre + (size_t)(c - 1) * m->dim, m->dim);
            m->distance[i] = d < m->distance[i] ? d : m->distance[i];
            total += m->distance[i];
        }
        double left = kvs_rng_double(&rng) * total;
        uint32_t index = 0;
        while (index + 1 < m->n && left >= m->distance[index])
            left -= m->distance[index++];
        set_centre(m, c, index);
    }
}

/* Each vector to its nearest centre, the first of equals; whether a label changed. */
static bool assign(kmeans *m)
{
    bool changed = false;
    memset(m->n_member, 0, m->k * sizeof *m->n_member);
    for (uint32_t i = 0; i < m->n; i++) {
        uint32_t best = 0;
        double least = (double)INFINITY;
        for (uint32_t c = 0; c < m->k; c++) {
            const double d = squared_distance(m->x + (size_t)i * m->dim, m->centre + (size_t)c * m->dim, m->dim);
            if (d < least) {
                least = d;
                best = c;
            }
        }
        changed |= m->label[i] != best;
        m->label[i] = best;
        m->distance[i] = least;
        m->n_member[best]++;
    }
    return changed;
}

/* A centre without vectors takes the one that lies farthest from its own and is not alone there. */
static void fill_empty(kmeans *m)
{
    for (uint32_t c = 0; c < m->k; c++) {
        if (m->n_member[c] != 0)
            continue;
        uint32_t far = UINT32_MAX;
        for (uint32_t i = 0; i < m->n; i++)
            if (m->n_member[m->label[i]] > 1 && (far == UINT32_MAX || m->distance[i] > m->distance[far]))
                far = i;
        if (far == UINT32_MAX)
            return;
        m->n_member[m->label[far]]--;
        m->label[far] = c;
        m->distance[far] = 0;
        m->n_member[c] = 1;
    }
}

static void move_centres(kmeans *m)
{
    memset(m->centre, 0, (size_t)m->k * m->dim * sizeof *m->centre);
    for (uint32_t i = 0; i < m->n; i++)
        for (uint32_t d = 0; d < m->dim; d++)
            m->centre[(size_t)m->label[i] * m->dim + d] += (double)m->x[(size_t)i * m->dim + d];
    for (uint32_t c = 0; c < m->k; c++)
        for (uint32_t d = 0; d < m->dim && m->n_member[c] > 0; d++)
            m->centre[(size_t)c * m->dim + d] /= m->n_member[c];
}

/* The sum of squared distances that this start ends with. */
static double run_start(kmeans *m, uint64_t start)
{
    draw_centres(m, start);
    memset(m->label, 0xff, m->n * sizeof *m->label);
    for (uint32_t step = 0; step < STEPS_MAX && assign(m); step++) {
        fill_empty(m);
        move_centres(m);
    }
    assign(m); /* steps may have run out on equal vectors, which change hands for ever */
    double inertia = 0;
    for (uint32_t i = 0; i < m->n; i++)
        inertia += m->distance[i];
    return inertia;
}

/* Numbers groups by their first member. */
static uint32_t renumber(const kmeans *m, uint32_t *order, uint32_t *label, float *centroid)
{
    uint32_t n_groups = 0;
    memset(order, 0xff, m->k * sizeof *order);
    for (uint32_t i = 0; i < m->n; i++) {
        if (order[m->label[i]] == UINT32_MAX)
            order[m->label[i]] = n_groups++;
        label[i] = order[m->label[i]];
    }
    for (uint32_t c = 0; c < m->k; c++)
        for (uint32_t d = 0; d < m->dim && order[c] != UINT32_MAX; d++)
            centroid[(size_t)order[c] * m->dim + d] = (float)m->centre[(size_t)c * m->dim + d];
    return n_groups;
}

kvs_status kvs_cluster(const float *x, uint32_t n, uint32_t dim, uint32_t k, const kvs_allocator *allocator,
                       uint32_t *label, float *centroid, kvs_error *err)
{
    kmeans m = {.x = x,
                .n = n,
                .dim = dim,
                .k = k,
                .centre = kvs_alloc(allocator, (size_t)k * dim, sizeof *m.centre),
                .distance = kvs_alloc(allocator, n, sizeof *m.distance),
                .label = kvs_alloc(allocator, n, sizeof *m.label),
                .n_member = kvs_alloc(allocator, k, sizeof *m.n_member)};
    kvs_status status = KVS_OK;
    if (m.centre == NULL || m.distance == NULL || m.label == NULL || m.n_member == NULL) {
        status = kvs_error_set(err, KVS_ENOMEM, "no memory to group %u windows into %u episodes", n, k);
    } else {
        double best = (double)INFINITY;
        uint64_t best_start = 0;
        for (uint64_t start = 0; start < STARTS; start++) {
            const double inertia = run_start(&m, start);
            if (inertia < best) {
                best = inertia;
                best_start = start;
            }
        }
        run_start(&m, best_start);
        const uint32_t n_groups = renumber(&m, m.n_member, label, centroid);
        if (n_groups < k)
            status = kvs_error_set(err, KVS_EINVAL,
                                   "the %u windows of the history fall into %u different groups: ask for at most %u "
                                   "episodes, not %u",
                                   n, n_groups, n_groups, k);
    }
    kvs_free(allocator, m.centre);
    kvs_free(allocator, m.distance);
    kvs_free(allocator, m.label);
    kvs_free(allocator, m.n_member);
    return status;
}

uint32_t kvs_cluster_nearest(const float *x, uint32_t n, uint32_t dim, const uint32_t *label, uint32_t which,
                             const float *centroid, uint32_t n_most, uint32_t *nearest, uint32_t *n_members)
{
    uint32_t count = 0;
    *n_members = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (label[i] != which)
            continue;
        ++*n_members;
        /* The vectors are of length 1 and share the centroid: products order as cosines do. */
        const double similarity = kvs_vector_dot(x + (size_t)i * dim, centroid, dim);
        uint32_t at = count;
        while (at > 0 && kvs_vector_dot(x + (size_t)nearest[at - 1] * dim, centroid, dim) < similarity)
            at--;
        if (at == n_most)
            continue;
        count = kvs_min_u32(count + 1, n_most);
        for (uint32_t j = count - 1; j > at; j--)
            nearest[j] = nearest[j - 1];
        nearest[at] = i;
    }
    return count;
}
