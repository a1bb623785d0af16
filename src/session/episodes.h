/* The parts of episodes.c: what a history is cut into, how its pieces are grouped, and the object that holds their
 * caches. EpiCache: Kim et al., arXiv:2509.17396. */
#ifndef KVS_SESSION_EPISODES_H
#define KVS_SESSION_EPISODES_H

#include "base/base.h"

/* ---- episode_text.c: pieces of a history ---- */

/* Window i is text [begin[i], begin[i + 1]). */
typedef struct kvs_windows {
    char *text;
    size_t *begin; /* [n + 1] */
    uint32_t n;
} kvs_windows;

/* Windows of per_window utterances `Speaker said, "text"`; an assistant's message of over 500 characters is first cut
 * into its sentences, of which those of 10 characters and less are left out. System messages are no utterances. ENOMEM,
 * EINVAL nothing was said; *out is empty then. */
kvs_status kvs_windows_make(const kvs_message *messages, size_t n_messages, uint32_t per_window,
                            const kvs_allocator *allocator, kvs_windows *out, kvs_error *err);
void kvs_windows_free(kvs_windows *w, const kvs_allocator *allocator);

/* ---- episode_cluster.c: groups of vectors ---- */

/* K-means over x [n][dim] f32, the best of 10 starts; the same for the same numbers. label [n]: 0 .. k - 1, in order of
 * first appearance; centroid [k][dim]. EINVAL: there are not k different vectors; ENOMEM. */
kvs_status kvs_cluster(const float *x, uint32_t n, uint32_t dim, uint32_t k, const kvs_allocator *allocator,
                       uint32_t *label, float *centroid, kvs_error *err);
/* Members of group `which` nearest to its centroid by cosine, nearest first, ties in order; at most n_most of them into
 * nearest. Returns their number; *n_members is how many the group has. */
uint32_t kvs_cluster_nearest(const float *x, uint32_t n, uint32_t dim, const uint32_t *label, uint32_t which,
                             const float *centroid, uint32_t n_most, uint32_t *nearest, uint32_t *n_members);
/* f64 sum of products; false if x cannot be normalised (all zero, or not numbers). */
double kvs_vector_dot(const float *a, const float *b, uint32_t n);
bool kvs_vector_normalise(float *x, uint32_t n);

/* ---- episodes.c ---- */

typedef struct kvs_episode {
    struct kvs_session *session;
    int32_t *words; /* [n_words] the episode prompt */
    uint32_t n_words, n_windows, n_medoids;
} kvs_episode;

/* What of the options a save keeps, and what follows from them. */
typedef struct kvs_episodes_plan {
    uint32_t n_episodes, window_utterances, n_medoids, block_tokens, words_tokens; /* words: room in every session */
    uint32_t share_tokens;                                                         /* kept by an episode, a head */
    uint32_t share_pages, work_pages;                                              /* a head */
    uint32_t dim, n_windows, chunk_tokens;
    uint64_t budget_bytes, seed;
    kvs_kv_type kv_type;
    kvs_arith arith;
    bool uniform_heads, keep_turns, shared_layers; /* shared_layers: layer_share is there */
    char protect[96], position[32], encoder[32];
} kvs_episodes_plan;

struct kvs_episodes {
    kvs_model *model;
    const kvs_allocator *allocator;
    kvs_episodes_plan plan;
    kvs_encode_fn encode;
    void *encode_ctx;
    kvs_episode *episodes; /* [n_episodes] */
    float *centroid;       /* [n_episodes][dim] */
    double *layer_share;   /* [n_layers], or NULL */
    uint32_t active;
    uint64_t peak_bytes; /* up to when `active` was entered */
};

/* Sizes and encoder from the options; sessions are made by kvs_episodes_open once plan is complete. */
kvs_status kvs_episodes_new(kvs_model *m, const kvs_episodes_options *opt, kvs_episodes **out, kvs_error *err);
kvs_status kvs_episodes_open(kvs_episodes *e, kvs_error *err);
/* EFORMAT: sizes of a plan that was read do not go together. */
kvs_status kvs_episodes_check_plan(kvs_episodes *e, kvs_error *err);
/* Holds more than an episode may that is not in work. */
bool kvs_episodes_over_share(const kvs_episodes *e, uint32_t episode);

#endif
