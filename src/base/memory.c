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

/* Decoding streams the whole cache and all weights once a token. With 4 KiB pages every one of them is a walk of the page
 * table (two nested ones in a virtual machine) and an end for the hardware's prefetchers; and touching a block first
 * costs a fault each. From this size on a block is offered to the kernel in huge pages. What is never touched still
 * costs nothing, in steps of HUGE_BYTES. */
#define HUGE_BYTES         ((size_t)2 << 20)
#define HUGE_FROM_BYTES    (4 * HUGE_BYTES)
#define LARGEST_PAGE_BYTES ((size_t)64 << 10) /* of any kernel this runs on: munmap takes whole pages */

/* total bytes, a multiple of every page size, at a border of HUGE_BYTES: one more is mapped, and what stands out at both
 * ends is given back. */
static void *map_huge(size_t total)
{
    if (total > SIZE_MAX - HUGE_BYTES)
        return MAP_FAILED;
    uint8_t *const base = mmap(NULL, total + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return MAP_FAILED;
    uint8_t *const at = base + (HUGE_BYTES - (uintptr_t)base % HUGE_BYTES) % HUGE_BYTES;
    uint8_t *const end = at + total;
    if (at != base)
        munmap(base, (size_t)(at - base));
    if (end < base + total + HUGE_BYTES)
        munmap(end, (size_t)(base + total + HUGE_BYTES - end));
#ifdef MADV_HUGEPAGE
    (void)madvise(at, total, MADV_HUGEPAGE); /* a refusal costs speed only */
#endif
    return at;
}

static void *default_alloc(void *ctx, size_t size_bytes)
{
    (void)ctx;
    if (size_bytes > SIZE_MAX - LARGEST_PAGE_BYTES - KVS_ALIGN)
        return NULL;
    size_t total = kvs_round_up(size_bytes + sizeof(block_header), KVS_ALIGN);
    block_header *h;
    if (total >= MMAP_FROM_BYTES) {
        total = kvs_round_up(total, LARGEST_PAGE_BYTES);
        h = total >= HUGE_FROM_BYTES ? map_huge(total)
                                     : mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
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
