/* The memory floor of an optimizer step: reads p, g, m, v and writes p, m, v in one pass, with next to no arithmetic.
 *
 * `mask` is 0, which the compiler does not know: every value is read, combined and written back as it was.
 */
#include <stdatomic.h>
#include <stdint.h>

struct row {
    char *p, *g, *m, *v;
    int64_t numel;
};

struct job {
    const struct row *rows;
    int64_t count, narrow;
    uint32_t mask;
    _Atomic int64_t next;
};

static void wide(const struct row *row, uint32_t mask) {
    uint32_t *restrict p = (uint32_t *)row->p, *restrict m = (uint32_t *)row->m, *restrict v = (uint32_t *)row->v;
    const uint32_t *restrict g = (const uint32_t *)row->g;
    for (int64_t i = 0; i < row->numel; i++) {
        uint32_t bits = g[i] & mask;
        p[i] ^= bits;
        m[i] ^= bits;
        v[i] ^= bits;
    }
}

/* p and g in 16 bits */
static void narrow(const struct row *row, uint32_t mask) {
    uint16_t *restrict p = (uint16_t *)row->p;
    uint32_t *restrict m = (uint32_t *)row->m, *restrict v = (uint32_t *)row->v;
    const uint16_t *restrict g = (const uint16_t *)row->g;
    for (int64_t i = 0; i < row->numel; i++) {
        uint32_t bits = g[i] & mask;
        p[i] ^= (uint16_t)bits;
        m[i] ^= bits;
        v[i] ^= bits;
    }
}

static void work(int64_t begin, int64_t end, void *context) {
    struct job *job = context;
    (void)begin;
    (void)end;
    for (int64_t i; (i = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)) < job->count;)
        (job->narrow ? narrow : wide)(&job->rows[i], job->mask);
}

typedef int32_t (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *);

void floor_pass(parallel_for run, const struct row *rows, int64_t count, int64_t threads, int64_t narrow, uint32_t mask) {
    struct job job = {.rows = rows, .count = count, .narrow = narrow, .mask = mask};
    run(0, threads, 1, work, &job);
}
