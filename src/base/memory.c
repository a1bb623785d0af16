/* Aligned, zeroed allocation behind the caller's allocator, with sizes that cannot overflow. */
#include "base/base.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Large blocks come from mmap: page pools are reserved whole at session create, and pages never touched must cost
 * address space only. The header in front of each block says how it is to be freed. */
typedef struct block_header {
    size_t mapped_bytes; /* 0: from aligned_alloc */
    char pad[KVS_ALIGN - sizeof(size_t)];
} block_header;
_Static_assert(sizeof(block_header) == KVS_ALIGN, "the header keeps the block aligned");

#define MMAP_FROM_BYTES ((size_t)1 << 20)

static void *default_alloc(void *ctx, size_t size_bytes)
{
    (void)ctx;
    if (size_bytes > SIZE_MAX - 2 * KVS_ALIGN)
        return NULL;
    const size_t total = kvs_round_up(size_bytes + sizeof(block_header), KVS_ALIGN);
    block_header *h;
    if (total >= MMAP_FROM_BYTES) {
        h = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (h == MAP_FAILED)
            return NULL;
        h->mapped_bytes = total;
    } else {
        h = aligned_alloc(KVS_ALIGN, total);
        if (h == NULL)
            return NULL;
        memset(h, 0, total);
    }
    return h + 1;
}

static void default_free(void *ctx, void *ptr)
{
    (void)ctx;
    if (ptr == NULL)
        return;
    block_header *h = (block_header *)ptr - 1;
    if (h->mapped_bytes != 0)
        munmap(h, h->mapped_bytes);
    else
        free(h);
}

static const kvs_allocator default_allocator = {default_alloc, default_free, NULL};

const kvs_allocator *kvs_allocator_default(void)
{
    return &default_allocator;
}

bool kvs_mul_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_mul_overflow(a, b, out);
}

void *kvs_alloc(const kvs_allocator *a, size_t n, size_t size_bytes)
{
    size_t total;
    if (!kvs_mul_size(n, size_bytes, &total))
        return NULL;
    if (a == NULL || a == &default_allocator)
        return default_alloc(NULL, total == 0 ? 1 : total); /* already zero */
    void *p = a->alloc(a->ctx, total == 0 ? 1 : total);
    if (p != NULL)
        memset(p, 0, total);
    return p;
}

void kvs_free(const kvs_allocator *a, void *ptr)
{
    if (ptr == NULL)
        return;
    if (a == NULL)
        a = &default_allocator;
    a->free(a->ctx, ptr);
}
