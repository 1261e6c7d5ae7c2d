/* One pass over lists of tensors: find them, cut them into grains, hand these to torch's threads.
 *
 * Needs no header of torch or Python to build; torch_api.h says how torch is reached. Right before the pass comes to a
 * row, it asks each of the row's tensors where its data is now and whether its layout is still the one that the plan was
 * made for: a tensor whose storage was swapped is followed, a row that does not fit any more is left out and reported,
 * and the caller makes a new plan for it. Asked one after the other before the pass, 10,000 tensors cost half as much as
 * the pass, nearly all of it waiting for memory; asked on the way, with the next rows prefetched, far less.
 */
#include <fenv.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "convert.h"
#include "plan.h"
#include "rule.h"
#include "torch_api.h"

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)

/* ---- the element loops, once for each instruction set ---- */

#define ISA baseline
#include "isa.h"
#undef ISA

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ISA avx2
#include "isa.h"
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
#endif
#define ISA avx512
#include "isa.h"
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

static const struct isa {
    const char *name;
    update_run update;
} isas[] = {
    {"baseline", update_baseline},
#if defined(__x86_64__)
    {"avx2", update_avx2},
    {"avx512", update_avx512},
#endif
};

static int isa_runs_here(int i) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (i == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
    if (i == 1)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return i == 0;
}

static const struct isa *chosen = &isas[0];

/* What fused.py expects of this library; a mismatch means that the file is older than the package. */
EXPORT int32_t sharded_adopt_interface(void) {
    return 1;
}

EXPORT const char *sharded_adopt_isa(void) {
    return chosen->name;
}

/* Takes the named instruction set, or the widest with "". Returns 0, or 1 where this machine does not have it. */
EXPORT int32_t sharded_adopt_choose_isa(const char *name) {
    for (int i = (int)(sizeof isas / sizeof *isas) - 1; i >= 0; i--)
        if ((!*name || !strcmp(isas[i].name, name)) && isa_runs_here(i)) {
            chosen = &isas[i];
            return 0;
        }
    return 1;
}

/* ---- the pass ---- */

struct job {
    struct plan *plan;
    const struct rule *rule;
    int64_t numel;
    fenv_t floating_point;
    _Atomic int64_t next;
};

/* Asks for the cache lines that `find` will read of later rows: the handles, what they point to, the storage. Where a
 * tensor keeps what is a guess (its address first in the handle, the storage's address third in the tensor); a wrong
 * guess costs a useless prefetch, which never faults. Inlined by force: GCC drops calls of a function that only
 * prefetches. */
static ALWAYS_INLINE void prefetch_row(const struct plan *plan, int64_t i) {
    enum { FAR = 3, MIDDLE = 2, NEAR = 1 };
    if (i + FAR < plan->rows)
        for (int c = 0; c < COLUMNS; c++)
            __builtin_prefetch(plan->row[i + FAR].tensor[c]);
    if (i + MIDDLE < plan->rows)
        for (int c = 0; c < COLUMNS; c++) {
            const char *tensor = *(const char *const *)plan->row[i + MIDDLE].tensor[c];
            for (int line = 0; line < 4; line++)
                __builtin_prefetch(tensor + 64 * line);
        }
    if (i + NEAR < plan->rows)
        for (int c = 0; c < COLUMNS; c++) {
            const char *storage = (*(const char *const *const *)plan->row[i + NEAR].tensor[c])[2];
            __builtin_prefetch(storage);
            __builtin_prefetch(storage + 64);
        }
}

/* Whether `next` goes on where `run` ends in all four tensors, under the same step. */
static int continues(const struct run *run, const struct run *next) {
    for (int c = PARAM; c <= EXP_AVG_SQ; c++)
        if (run->dtype[c] != next->dtype[c] || run->at[c] + run->numel * element_size(run->dtype[c]) != next->at[c])
            return 0;
    return run->step == next->step &&
        (!rounds_by_index(run->dtype[EXP_AVG_SQ]) || run->first_index + run->numel == next->first_index);
}

/* Asks for the start of a run while the one before it is still being updated. */
static ALWAYS_INLINE void prefetch_data(const struct run *run) {
    for (int c = PARAM; c <= EXP_AVG_SQ; c++)
        for (int line = 0; line < 4; line++)
            __builtin_prefetch(run->at[c] + 64 * line);
}

/* Elements [from, to) of the list: neighbours in memory join into runs, each run is updated in one call. */
static void update_range(struct job *job, int64_t from, int64_t to) {
    struct plan *plan = job->plan;
    const struct rule *rule = job->rule;
    int64_t low = 0, high = plan->rows - 1; /* the row that holds element `from` */
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (plan->row[middle].end > from)
            high = middle;
        else
            low = middle + 1;
    }
    struct run run = {.numel = 0};
    for (int64_t i = low; from < to; i++) {
        struct row *row = &plan->row[i];
        struct found found;
        const int64_t begin = from - (row->end - row->numel);
        const int64_t stop = row->end < to ? row->end : to;
        const double step = plan->step[row->step_index];
        const int is_found = row->numel && !row->left && find(row, &found) && *(float *)found.at[STEP] == step;
        prefetch_row(plan, i); /* not before `find`, which would have to queue behind it */
        if (row->numel) {
            if (!is_found) {
                row->left = 1;
            } else {
                struct run piece = {
                    .numel = stop - from,
                    .first_index = row->first_index + begin,
                    .clip = rule->clips[row->step_index],
                    .step = (uint32_t)step,
                };
                for (int c = PARAM; c <= EXP_AVG_SQ; c++) {
                    piece.dtype[c] = found.dtype[c];
                    piece.at[c] = found.at[c] + begin * element_size(found.dtype[c]);
                }
                prefetch_data(&piece);
                if (run.numel && continues(&run, &piece)) {
                    run.numel += piece.numel;
                } else {
                    if (run.numel)
                        chosen->update(&run, rule);
                    run = piece;
                }
                if (row->is_cut)
                    row->step_at = (float *)found.at[STEP];
                else
                    *(float *)found.at[STEP] += (float)rule->step_increment;
            }
        }
        from = stop;
    }
    if (run.numel)
        chosen->update(&run, rule);
}

static void work(int64_t begin, int64_t end, void *context) {
    struct job *job = context;
    fenv_t own;
    /* the caller's way with subnormals, on every thread */
    fegetenv(&own);
    fesetenv(&job->floating_point);
    (void)begin;
    (void)end;
    for (;;) {
        int64_t from = atomic_fetch_add_explicit(&job->next, GRAIN, memory_order_relaxed);
        if (from >= job->numel)
            break;
        update_range(job, from, from + GRAIN < job->numel ? from + GRAIN : job->numel);
    }
    fesetenv(&own);
}

/* Moves the tensors of a list into a column of the plan, which owns them from now on. Returns 0 if there are too many or
 * too few; those are let go. */
static int take_column(struct plan *plan, int column, handle list) {
    size_t count = 0;
    torch.list_size(list, &count);
    for (size_t i = 0; i < count; i++) {
        stable_value tensor;
        torch.list_get_item(list, i, &tensor);
        if ((int64_t)i < plan->rows)
            plan->row[i].tensor[column] = (handle)tensor;
        else
            torch.delete_tensor((handle)tensor);
    }
    torch.delete_list(list);
    return (int64_t)count == plan->rows;
}

/* Steps that no grain could advance: of cut rows, all of whose grains have to see the old step, and of empty rows. */
static void advance_other_rows(struct plan *plan, const struct rule *rule) {
    for (int64_t i = 0; i < plan->rows; i++) {
        struct row *row = &plan->row[i];
        struct found found;
        if (row->left || (row->numel && !row->is_cut))
            continue;
        if (row->is_cut)
            *row->step_at += (float)rule->step_increment;
        else if (find(row, &found) && *(float *)found.at[STEP] == plan->step[row->step_index])
            *(float *)found.at[STEP] += (float)rule->step_increment;
        else
            row->left = 1;
    }
}

/* Updates all rows; returns how many were left as they were, marked in their `left`. */
static int64_t update(struct plan *plan, const struct rule *rule) {
    struct job job = {.plan = plan, .rule = rule, .numel = plan->rows ? plan->row[plan->rows - 1].end : 0};
    int64_t left = 0, grains = (job.numel + GRAIN - 1) / GRAIN;
    uint32_t threads = 1;
    fegetenv(&job.floating_point);
    torch.get_num_threads(&threads);
    if (threads > grains)
        threads = (uint32_t)grains;
    for (int64_t i = 0; i < plan->rows; i++)
        plan->row[i].left = 0;
    if (threads <= 1)
        work(0, 1, &job);
    else
        torch.parallel_for(0, threads, 1, work, &job);
    advance_other_rows(plan, rule);
    for (int64_t s = 0; s < plan->steps; s++)
        plan->step[s] = (float)plan->step[s] + (float)rule->step_increment;
    for (int64_t i = 0; i < plan->rows; i++)
        left += plan->row[i].left;
    return left;
}

/* Writes 1 to left[i] for every row that the last step left as it was. */
EXPORT void sharded_adopt_plan_left(const struct plan *plan, uint8_t *left) {
    for (int64_t i = 0; i < plan->rows; i++)
        left[i] = (uint8_t)plan->row[i].left;
}

static int grads_are_dense(const struct plan *plan) {
    int32_t layout;
    for (int64_t i = 0; i < plan->rows; i++)
        if (torch.get_layout(plan->row[i].tensor[GRAD], &layout) || layout != torch_strided)
            return 0;
    return 1;
}

/* Gradients are let go after every step: kept, they would outlive zero_grad(). */
static void release_grads(struct plan *plan) {
    enum { FAR = 32, NEAR = 16 };
    for (int64_t i = 0; i < plan->rows; i++) {
        struct row *row = &plan->row[i];
        if (i + FAR < plan->rows)
            __builtin_prefetch(row[FAR].tensor[GRAD]);
        if (i + NEAR < plan->rows && row[NEAR].tensor[GRAD])
            __builtin_prefetch(*(const char *const *)row[NEAR].tensor[GRAD], 1);
        if (row->tensor[GRAD])
            torch.delete_tensor(row->tensor[GRAD]);
        row->tensor[GRAD] = NULL;
    }
}

/* ---- the operators ---- */

/* _bind(int plan, int column, Tensor[] tensors) -> int: the plan takes a reference to each tensor of a column. Returns 0,
 * or 1 if there are too many or too few. */
static void bind_boxed(stable_value *stack, uint64_t arguments, uint64_t results) {
    (void)arguments;
    (void)results;
    stack[0] = (stable_value)!take_column((struct plan *)stack[0], (int)stack[1], (handle)stack[2]);
}

/* adopt_native_(int plan, int rule, Tensor[] grads) -> int: one step. Returns how many rows were left, -1 if there are
 * too many or too few gradients, -2 if one of them is not dense; then nothing has changed. */
static void update_boxed(stable_value *stack, uint64_t arguments, uint64_t results) {
    struct plan *plan = (struct plan *)stack[0];
    const struct rule *rule = (const struct rule *)stack[1];
    (void)arguments;
    (void)results;
    if (!take_column(plan, GRAD, (handle)stack[2]))
        stack[0] = (stable_value)-1;
    else
        stack[0] = (stable_value)(grads_are_dense(plan) ? update(plan, rule) : -2);
    release_grads(plan);
}

/* Takes the addresses of torch's functions, in the order of `torch` above, and registers the operators once.
 * `torch_version`: as TORCH_ABI_VERSION, of the torch whose calling convention is used here. Returns 0 or an error. */
EXPORT int32_t sharded_adopt_init(void *const *functions, int64_t count, uint64_t torch_version) {
    handle fragment, implementations;
    if (count * (int64_t)sizeof(void *) != (int64_t)sizeof torch)
        return -1;
    memcpy(&torch, functions, sizeof torch);
    torch_f32 = torch.dtype_float32();
    torch_f64 = torch.dtype_float64();
    torch_bf16 = torch.dtype_bfloat16();
    torch_f16 = torch.dtype_float16();
    torch_cpu = torch.device_type_cpu();
    torch_strided = torch.layout_strided();
    sharded_adopt_choose_isa("");
    return torch.init_fragment("sharded_adopt", __FILE__, __LINE__, &fragment) ||
        torch.library_def(fragment, "_bind(int plan, int column, Tensor[] tensors) -> int") ||
        torch.library_def(fragment, "adopt_native_(int plan, int rule, Tensor[] grads) -> int") ||
        torch.init_impl("sharded_adopt", "CompositeExplicitAutograd", __FILE__, __LINE__, &implementations) ||
        torch.library_impl(implementations, "_bind", bind_boxed, torch_version) ||
        torch.library_impl(implementations, "adopt_native_", update_boxed, torch_version);
}
