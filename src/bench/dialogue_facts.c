/* Synthetic dialogues with planted facts, the recall workload of reference/evaluation.md 3.4. A fact is "the <thing>
 * of <key> is <value>"; key and value are drawn at random, so a model can only know it from the conversation.
 * Confusers are facts of the same kind about other keys. Wording is neutral on purpose: nothing that looks like a
 * credential, which instruction-tuned models refuse to repeat. Own templates and word lists. */
#include "bench/dialogue.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_WORDS         16 /* keys and values of each kind */
#define N_CONFUSERS_MIN 4
#define N_CONFUSERS_MAX 6
#define N_PER_MESSAGE   3 /* confusers told in one user message, at most */
#define N_REPEATS_MAX   3

typedef struct fact_kind {
    const char *subject; /* with one %s for the key; follows "the" or "The" or "What is the" */
    const char *article; /* before the value, with its space, or "" */
    const char *keys[N_WORDS], *values[N_WORDS];
} fact_kind;

/* No value is part of another word in these lists, and none is a key: a hit is then a plain search for the value
 * (tests/unit/test_dialogue.c checks it). */
static const fact_kind kinds[] = {
    {"paint colour of room %s",
     "",
     {"Delta", "Kestrel", "Harbour", "Linden", "Orbit", "Quarry", "Summit", "Tundra", "Vesper", "Willow", "Zephyr",
      "Beacon", "Cobble", "Drift", "Ember", "Fjord"},
     {"ochre", "teal", "maroon", "lavender", "turquoise", "crimson", "beige", "indigo", "magenta", "charcoal", "ivory",
      "amber", "scarlet", "khaki", "cobalt", "mustard"}},
    {"mascot of the %s team",
     "a ",
     {"Northfield", "Riverton", "Ashby", "Colwick", "Dunmore", "Eastleigh", "Farrow", "Greyling", "Hexley", "Ilford",
      "Kelby", "Marlow", "Norwood", "Oakham", "Penrith", "Selby"},
     {"badger", "heron", "walrus", "gecko", "lynx", "pelican", "hedgehog", "dolphin", "buffalo", "raccoon", "penguin",
      "tortoise", "panther", "squirrel", "moose", "falcon"}},
    {"dish of the day at the %s cafe",
     "",
     {"Lantern", "Copper Pot", "Blue Door", "Corner", "Station", "Garden Gate", "Old Mill", "Sunrise", "Anchor",
      "Market", "Bridge", "Hilltop", "Terrace", "Canal", "Courtyard", "Fountain"},
     {"lasagne", "goulash", "risotto", "moussaka", "paella", "ratatouille", "dumplings", "meatballs", "pancakes",
      "gnocchi", "chowder", "ravioli", "falafel", "casserole", "schnitzel", "fishcakes"}},
    {"meeting place of the %s club",
     "the ",
     {"chess", "hiking", "pottery", "film", "sailing", "poetry", "running", "origami", "juggling", "birding",
      "debating", "quilting", "astronomy", "climbing", "baking", "fencing"},
     {"library", "gymnasium", "boathouse", "cafeteria", "greenhouse", "observatory", "chapel", "workshop", "lighthouse",
      "museum", "theatre", "bakery", "orchard", "pavilion", "basement", "rooftop"}},
    {"tree planted in %s Street",
     "a ",
     {"Albert", "Bishop", "Clement", "Dover", "Elgin", "Foster", "Granby", "Howard", "Jubilee", "Kingsley", "Lancaster",
      "Mercer", "Nelson", "Osborne", "Prince", "Regent"},
     {"chestnut", "maple", "birch", "magnolia", "sycamore", "juniper", "poplar", "walnut", "cypress", "hazel", "spruce",
      "mulberry", "hawthorn", "rowan", "larch", "redwood"}},
    {"instrument that %s plays",
     "the ",
     {"Agnes", "Bernard", "Camille", "Dorothy", "Edgar", "Felicity", "Gilbert", "Henrietta", "Isaac", "Josephine",
      "Leopold", "Matilda", "Nathaniel", "Octavia", "Philippa", "Roland"},
     {"cello", "trumpet", "accordion", "clarinet", "banjo", "bassoon", "harmonica", "mandolin", "trombone", "violin",
      "xylophone", "saxophone", "tambourine", "ukulele", "bagpipes", "piccolo"}},
    {"last stop of tour %s",
     "",
     {"Alpha", "Bravo", "Charlie", "Echo", "Foxtrot", "Golf", "Hotel", "India", "Juliet", "Kilo", "Lima", "November",
      "Quebec", "Romeo", "Sierra", "Tango"},
     {"Lisbon", "Vienna", "Oslo", "Nairobi", "Kyoto", "Santiago", "Helsinki", "Toronto", "Marrakesh", "Krakow",
      "Auckland", "Budapest", "Havana", "Seville", "Reykjavik", "Bangkok"}},
    {"cloth chosen for sofa number %s",
     "",
     {"eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
      "thirty", "forty", "fifty", "sixty", "seventy", "eighty"},
     {"velvet", "linen", "corduroy", "denim", "tweed", "canvas", "chenille", "flannel", "damask", "satin", "leather",
      "brocade", "muslin", "mohair", "burlap", "gingham"}},
};
#define N_KINDS ((uint32_t)(sizeof kinds / sizeof *kinds))

/* Openings of a message that tells facts, and answers to it that repeat none of them. */
static const char *const tell_openings[] = {"Something to keep in mind for later: ", "A note before I forget: ",
                                            "By the way, ", "For the record, ", "Please remember this: "};
static const char *const update_openings[] = {
    "A small change: ", "I have to correct something: ", "This has changed since we spoke: "};
static const char *const acknowledgements[] = {"Thanks, I have made a note of that.",
                                               "Noted. Tell me if anything about it changes.",
                                               "Got it, I will keep that in mind for later.",
                                               "Understood. I will remember it.", "All right, that is on my list now."};
static const char *const update_acknowledgements[] = {
    "Thanks for the correction, I will go by the new one from now on.",
    "Understood, the earlier note no longer holds. I have replaced it.", "Noted, I have updated that."};
#define PICK(rng, list) (list)[kvs_rng_below((rng), (uint32_t)(sizeof(list) / sizeof *(list)))]

typedef enum slot_kind { SLOT_FREE = 0, SLOT_TELL, SLOT_UPDATE, SLOT_CONFUSE, SLOT_ASK } slot_kind;

/* A slot is one user message and the answer to it. */
typedef struct slot {
    slot_kind kind;
    uint32_t fact_idx, first, n; /* first, n: which of the fact's confusers; first of an ASK is its repeat */
} slot;

typedef struct fact_plan {
    uint32_t kind, n_confusers;
    uint32_t keys[N_CONFUSERS_MAX + 1];   /* [0] the fact's own */
    uint32_t values[N_CONFUSERS_MAX + 2]; /* [0] gold, then the confusers', last the stale value if updated */
    bool updated;
    kvs_fact_place place;
    uint32_t told_slot;
    kvs_dialogue_span told, stale;
} fact_plan;

typedef struct plan {
    const kvs_facts_options *opt;
    uint64_t index;
    kvs_rng rng, filler_rng;
    fact_plan facts[sizeof kinds / sizeof *kinds];
    slot *slots;                           /* [n_slots] */
    uint32_t n_slots, n_updates, ask_from; /* slots from ask_from on hold questions and fillers only */
    const kvs_dialogue_set *fillers;
    uint32_t *filler_order; /* [fillers->n_items] */
    uint32_t filler_at, filler_message;
    kvs_dialogue *out;
    kvs_error *err;
} plan;

uint32_t kvs_facts_max(void)
{
    return N_KINDS;
}

const char *kvs_facts_value(uint32_t kind, uint32_t value_idx)
{
    return kind < N_KINDS && value_idx < N_WORDS ? kinds[kind].values[value_idx] : NULL;
}

const char *kvs_facts_key(uint32_t kind, uint32_t key_idx)
{
    return kind < N_KINDS && key_idx < N_WORDS ? kinds[kind].keys[key_idx] : NULL;
}

void kvs_facts_options_default(kvs_facts_options *opt)
{
    *opt = (kvs_facts_options){.n_facts = 1, .n_messages = 40, .n_repeats = 1, .update_share = 0.25};
}

/* ---- what is said ---- */

/* The first n of a random permutation of [0, N_WORDS). */
static void draw_distinct(kvs_rng *rng, uint32_t *out, uint32_t n)
{
    uint32_t all[N_WORDS];
    for (uint32_t i = 0; i < N_WORDS; i++)
        all[i] = i;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t j = i + kvs_rng_below(rng, N_WORDS - i), t = all[i];
        all[i] = all[j];
        all[j] = t;
        out[i] = all[i];
    }
}

static void draw_facts(plan *p)
{
    uint32_t kind_order[N_WORDS];
    _Static_assert(sizeof kinds / sizeof *kinds <= N_WORDS, "draw_distinct permutes N_WORDS indices");
    draw_distinct(&p->rng, kind_order, N_WORDS);
    uint32_t at = 0;
    for (uint32_t f = 0; f < p->opt->n_facts; f++) {
        fact_plan *fact = &p->facts[f];
        while (kind_order[at] >= N_KINDS)
            at++;
        fact->kind = kind_order[at++];
        fact->n_confusers = N_CONFUSERS_MIN + kvs_rng_below(&p->rng, N_CONFUSERS_MAX - N_CONFUSERS_MIN + 1);
        draw_distinct(&p->rng, fact->keys, fact->n_confusers + 1);
        fact->updated = kvs_rng_double(&p->rng) < p->opt->update_share;
        draw_distinct(&p->rng, fact->values, fact->n_confusers + 1 + fact->updated);
        p->n_updates += fact->updated;
        /* Consecutive dialogues and facts cycle through the places, so that every cell gets the same share. */
        fact->place = (kvs_fact_place)((p->index + f) % KVS_FACT_PLACE_COUNT);
    }
}

/* ---- when it is said ---- */

/* The free slot in [low, high) nearest to at; the caller knows that there is one. */
static uint32_t nearest_free(const plan *p, uint32_t low, uint32_t high, uint32_t at)
{
    for (uint32_t distance = 0; distance < high - low; distance++) {
        if (at + distance < high && at + distance >= low && p->slots[at + distance].kind == SLOT_FREE)
            return at + distance;
        if (at >= low + distance && at - distance < high && p->slots[at - distance].kind == SLOT_FREE)
            return at - distance;
    }
    return low;
}

static uint32_t n_confuser_slots(const fact_plan *f)
{
    return (f->n_confusers + N_PER_MESSAGE - 1) / N_PER_MESSAGE;
}

static kvs_status reserve_slots(plan *p)
{
    const uint32_t n_facts = p->opt->n_facts;
    /* Questions about a fact come every other turn (SCBench asks again and again; arXiv 2412.10319), or in rounds. */
    const uint32_t stride = kvs_max_u32(2, n_facts), n_ask = (p->opt->n_repeats - 1) * stride + n_facts;
    uint32_t n_before = n_facts + p->n_updates;
    for (uint32_t f = 0; f < n_facts; f++)
        n_before += n_confuser_slots(&p->facts[f]);
    p->n_slots = p->opt->n_messages / 2;
    if (p->opt->n_messages % 2 || p->n_slots < n_before + n_ask)
        return kvs_error_set(p->err, KVS_EINVAL,
                             "n_messages is %u; dialogue %" PRIu64 " with %u facts and %u questions "
                             "about each needs an even number, at least %u",
                             p->opt->n_messages, p->index, n_facts, p->opt->n_repeats, 2 * (n_before + n_ask));
    p->ask_from = p->n_slots - n_ask;
    p->slots = calloc(p->n_slots, sizeof *p->slots);
    if (!p->slots)
        return kvs_error_set(p->err, KVS_ENOMEM, "no memory for %u turns", p->n_slots);
    uint32_t order[N_WORDS], at = 0;
    draw_distinct(&p->rng, order, N_WORDS);
    for (uint32_t i = 0; i < N_WORDS; i++) {
        if (order[i] >= n_facts)
            continue;
        for (uint32_t r = 0; r < p->opt->n_repeats; r++)
            p->slots[p->ask_from + at + r * stride] = (slot){SLOT_ASK, order[i], r, 0};
        at++;
    }
    return KVS_OK;
}

/* Facts first, updates after their facts, confusers wherever is room, all before the first question. The last
 * n_updates slots are kept from facts, so that every update finds a free slot behind its fact. */
static void place_slots(plan *p)
{
    static const double from[KVS_FACT_PLACE_COUNT] = {0.0, 0.4, 0.75}, width = 0.2;
    const uint32_t n_tell = p->ask_from - p->n_updates;
    for (uint32_t f = 0; f < p->opt->n_facts; f++) {
        fact_plan *fact = &p->facts[f];
        const double at = (from[fact->place] + width * kvs_rng_double(&p->rng)) * n_tell;
        fact->told_slot = nearest_free(p, 0, n_tell, (uint32_t)at);
        p->slots[fact->told_slot] = (slot){SLOT_TELL, f, 0, 0};
    }
    for (uint32_t f = 0; f < p->opt->n_facts; f++) {
        if (!p->facts[f].updated)
            continue;
        const uint32_t low = p->facts[f].told_slot + 1;
        const uint32_t at = nearest_free(p, low, p->ask_from, low + kvs_rng_below(&p->rng, p->ask_from - low));
        p->slots[at] = (slot){SLOT_UPDATE, f, 0, 0};
    }
    for (uint32_t f = 0; f < p->opt->n_facts; f++) {
        const fact_plan *fact = &p->facts[f];
        const uint32_t n_groups = n_confuser_slots(fact);
        for (uint32_t g = 0; g < n_groups; g++) {
            const uint32_t first = g * fact->n_confusers / n_groups, end = (g + 1) * fact->n_confusers / n_groups;
            const uint32_t at = nearest_free(p, 0, p->ask_from, kvs_rng_below(&p->rng, p->ask_from));
            p->slots[at] = (slot){SLOT_CONFUSE, f, first, end - first};
        }
    }
}

/* ---- fillers ---- */

/* ASCII case is ignored: "Amber" at the start of a sentence is the value amber. */
static bool mentions(const plan *p, const char *text)
{
    for (uint32_t f = 0; f < p->opt->n_facts; f++) {
        const fact_plan *fact = &p->facts[f];
        for (uint32_t v = 0; v < fact->n_confusers + 1 + fact->updated; v++)
            if (strcasestr(text, kinds[fact->kind].values[fact->values[v]]))
                return true;
    }
    return false;
}

static kvs_status shuffle_fillers(plan *p)
{
    const uint32_t n = p->fillers->n_items;
    p->filler_order = calloc((size_t)n + 1, sizeof *p->filler_order);
    if (!p->filler_order)
        return kvs_error_set(p->err, KVS_ENOMEM, "no memory for the order of %u fillers", n);
    for (uint32_t i = 0; i < n; i++)
        p->filler_order[i] = i;
    for (uint32_t i = n; i > 1; i--) {
        const uint32_t j = kvs_rng_below(&p->filler_rng, i), t = p->filler_order[i - 1];
        p->filler_order[i - 1] = p->filler_order[j];
        p->filler_order[j] = t;
    }
    return KVS_OK;
}

static kvs_status say(plan *p, const char *role, const char *text)
{
    return kvs_dialogue_append(p->out, role, text, KVS_DIALOGUE_GENERATED, false, p->err);
}

/* The next exchange of the filler being told, or the first of the next filler: between the planted turns runs an
 * ordinary conversation, not a pile of unrelated sentences. */
static kvs_status say_filler(plan *p)
{
    const uint32_t n = p->fillers->n_items;
    for (uint32_t n_ended = 0; n_ended <= n;) {
        const kvs_dialogue *d = n ? &p->fillers->items[p->filler_order[p->filler_at]] : NULL;
        if (!d || p->filler_message + 1 >= d->n_messages) {
            p->filler_at = n ? (p->filler_at + 1) % n : 0;
            p->filler_message = 0;
            n_ended++;
            continue;
        }
        const kvs_dialogue_message *m = &d->messages[p->filler_message++];
        if (strcmp(m[0].role, "user") != 0 || strcmp(m[1].role, "assistant") != 0)
            continue;
        p->filler_message++;
        if (mentions(p, m[0].content) || mentions(p, m[1].content))
            continue;
        for (int i = 0; i < 2; i++) {
            KVS_TRY(kvs_dialogue_append(p->out, m[i].role, m[i].content, m[i].source_idx, false, p->err));
            p->out->messages[p->out->n_messages - 1].part = 1 + p->filler_order[p->filler_at];
        }
        return KVS_OK;
    }
    return kvs_error_set(p->err, KVS_EINVAL,
                         "the fillers %s have no user message with an answer that is free of the "
                         "planted values",
                         p->fillers->name ? p->fillers->name : "given");
}

/* ---- text ---- */

typedef struct text {
    char bytes[1024]; /* a few fixed phrases and at most N_PER_MESSAGE facts of under 80 bytes */
    size_t n;
} text;

__attribute__((format(printf, 2, 3))) static void put(text *t, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    const int n = vsnprintf(t->bytes + t->n, sizeof t->bytes - t->n, fmt, args);
    va_end(args);
    if (n > 0)
        t->n += (size_t)n;
}

/* "paint colour of room Delta": the subject's one %s stands for the key. */
static void put_subject(text *t, const fact_plan *f, uint32_t which)
{
    const char *subject = kinds[f->kind].subject, *hole = strstr(subject, "%s");
    put(t, "%.*s%s%s", (int)(hole - subject), subject, kinds[f->kind].keys[f->keys[which]], hole + 2);
}

/* Returns where the value stands. No value that takes "a " starts with a vowel. */
static kvs_dialogue_span put_value(text *t, const fact_plan *f, uint32_t value)
{
    const char *word = kinds[f->kind].values[f->values[value]];
    put(t, "%s", kinds[f->kind].article);
    const uint32_t start = (uint32_t)t->n;
    put(t, "%s", word);
    return (kvs_dialogue_span){0, start, (uint32_t)t->n};
}

static kvs_dialogue_span put_fact(text *t, const fact_plan *f, uint32_t which, uint32_t value, const char *verb)
{
    put_subject(t, f, which);
    put(t, " %s ", verb);
    return put_value(t, f, value);
}

static kvs_status say_told(plan *p, fact_plan *f, bool update)
{
    text t = {.n = 0};
    put(&t, "%sthe ", update ? PICK(&p->rng, update_openings) : PICK(&p->rng, tell_openings));
    const uint32_t value = f->updated && !update ? f->n_confusers + 1 : 0;
    kvs_dialogue_span span = put_fact(&t, f, 0, value, update ? "is now" : "is");
    put(&t, ".");
    span.message_idx = p->out->n_messages;
    if (f->updated && !update)
        f->stale = span;
    else
        f->told = span;
    KVS_TRY(say(p, "user", t.bytes));
    return say(p, "assistant", update ? PICK(&p->rng, update_acknowledgements) : PICK(&p->rng, acknowledgements));
}

static kvs_status say_confusers(plan *p, const fact_plan *f, const slot *s)
{
    text t = {.n = 0};
    put(&t, "%s", PICK(&p->rng, tell_openings));
    for (uint32_t i = 0; i < s->n; i++) {
        put(&t, "%s", i == 0 ? "the " : i + 1 < s->n ? ", the " : " and the ");
        put_fact(&t, f, 1 + s->first + i, 1 + s->first + i, "is");
    }
    put(&t, ".");
    KVS_TRY(say(p, "user", t.bytes));
    return say(p, "assistant", PICK(&p->rng, acknowledgements));
}

static kvs_status record(plan *p, const fact_plan *f, const slot *s, const char *question, kvs_dialogue_span answer)
{
    kvs_dialogue_fact *rec = &p->out->facts[p->out->n_facts++];
    const uint32_t question_idx = p->out->n_messages - 2;
    *rec = (kvs_dialogue_fact){.fact_idx = s->fact_idx,
                               .repeat_idx = s->first,
                               .place = f->place,
                               .told = f->told,
                               .stale = f->stale,
                               .answer = answer,
                               .question_idx = question_idx,
                               .lag_messages = question_idx - f->told.message_idx,
                               .updated = f->updated};
    const uint32_t n = f->n_confusers + 1 + f->updated;
    rec->question = strdup(question);
    rec->gold = strdup(kinds[f->kind].values[f->values[0]]);
    rec->candidates = calloc(n, sizeof *rec->candidates);
    bool ok = rec->question && rec->gold && rec->candidates;
    for (uint32_t i = 0; ok && i < n; i++) {
        ok = (rec->candidates[i] = strdup(kinds[f->kind].values[f->values[i]])) != NULL;
        rec->n_candidates += ok;
    }
    return ok ? KVS_OK : kvs_error_set(p->err, KVS_ENOMEM, "no memory for a planted fact");
}

static kvs_status say_question(plan *p, const fact_plan *f, const slot *s)
{
    text question = {.n = 0}, answer = {.n = 0};
    put(&question, "What is the ");
    put_subject(&question, f, 0);
    put(&question, "? Answer in one short sentence.");
    put(&answer, "The ");
    kvs_dialogue_span span = put_fact(&answer, f, 0, 0, "is");
    put(&answer, ".");
    span.message_idx = p->out->n_messages + 1;
    KVS_TRY(say(p, "user", question.bytes));
    KVS_TRY(say(p, "assistant", answer.bytes));
    return record(p, f, s, question.bytes, span);
}

static kvs_status say_all(plan *p)
{
    p->out->facts = calloc((size_t)p->opt->n_facts * p->opt->n_repeats, sizeof *p->out->facts);
    if (!p->out->facts)
        return kvs_error_set(p->err, KVS_ENOMEM, "no memory for %u planted facts", p->opt->n_facts);
    for (uint32_t i = 0; i < p->n_slots; i++) {
        const slot *s = &p->slots[i];
        fact_plan *f = &p->facts[s->fact_idx];
        switch (s->kind) {
        case SLOT_FREE:
            KVS_TRY(say_filler(p));
            break;
        case SLOT_TELL:
        case SLOT_UPDATE:
            KVS_TRY(say_told(p, f, s->kind == SLOT_UPDATE));
            break;
        case SLOT_CONFUSE:
            KVS_TRY(say_confusers(p, f, s));
            break;
        case SLOT_ASK:
            KVS_TRY(say_question(p, f, s));
            break;
        }
    }
    return KVS_OK;
}

static kvs_status generate(plan *p)
{
    if (asprintf(&p->out->id, "facts-%" PRIu64 "-%" PRIu64, p->opt->seed, p->index) < 0)
        p->out->id = NULL;
    if (asprintf(&p->out->origin, "generated: %u facts, fillers from %s", p->opt->n_facts,
                 p->fillers->name ? p->fillers->name : "a set") < 0)
        p->out->origin = NULL;
    if (!p->out->id || !p->out->origin)
        return kvs_error_set(p->err, KVS_ENOMEM, "no memory for the id of a dialogue");
    p->out->has_assistant = true;
    draw_facts(p);
    KVS_TRY(reserve_slots(p));
    place_slots(p);
    KVS_TRY(shuffle_fillers(p));
    return say_all(p);
}

static kvs_status check_options(const kvs_facts_options *opt, kvs_error *err)
{
    if (opt->n_facts < 1 || opt->n_facts > N_KINDS)
        return kvs_error_set(err, KVS_EINVAL, "n_facts is %u; it has to be 1 to %u", opt->n_facts, N_KINDS);
    if (opt->n_repeats < 1 || opt->n_repeats > N_REPEATS_MAX)
        return kvs_error_set(err, KVS_EINVAL, "n_repeats is %u; it has to be 1 to %d", opt->n_repeats, N_REPEATS_MAX);
    if (!(opt->update_share >= 0 && opt->update_share <= 1))
        return kvs_error_set(err, KVS_EINVAL, "update_share is %g; it has to be 0 to 1", opt->update_share);
    return KVS_OK;
}

kvs_status kvs_dialogue_facts(const kvs_facts_options *opt, uint64_t index, kvs_dialogue *out, kvs_error *err)
{
    memset(out, 0, sizeof *out);
    KVS_TRY(check_options(opt, err));
    kvs_dialogue_set embedded = {0};
    if (!opt->fillers)
        KVS_TRY(kvs_dialogue_set_embedded(&embedded, err));
    plan p = {.opt = opt, .index = index, .fillers = opt->fillers ? opt->fillers : &embedded, .out = out, .err = err};
    p.rng.state = kvs_hash3(opt->seed, index, 1);
    p.filler_rng.state = kvs_hash3(opt->seed, index, 2);
    const kvs_status status = generate(&p);
    free(p.slots);
    free(p.filler_order);
    kvs_dialogue_set_free(&embedded);
    if (status != KVS_OK)
        kvs_dialogue_free(out);
    return status;
}
