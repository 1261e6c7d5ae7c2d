/* The plan: what is constant of one list of tensors, and where its tensors are at this moment.
 *
 * A plan owns references to the parameters, moments and steps (not to gradients, which come and go), so that a step need
 * not carry them through Python.
 */
#ifndef SHARDED_ADOPT_PLAN_H
#define SHARDED_ADOPT_PLAN_H

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "rule.h"
#include "torch_api.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { GRAIN = 1 << 15 }; /* elements a thread takes at a time: 0.9 MB in fp32 */

enum { MAX_DIM = 16, COLUMNS = 5 };

struct row {
    handle tensor[COLUMNS]; /* by column; GRAD is empty between steps */
    const int64_t *shape;   /* dim sizes, then dim strides, of parameter, gradient and moments; in the plan's `shapes` */
    int64_t numel;
    int64_t end;            /* elements of this and of all earlier rows */
    int64_t first_index;    /* of the row's first element in its parameter: for the rounding bits only */
    int32_t dim;
    int32_t step_index;     /* into the plan's distinct steps */
    int8_t dtype[COLUMNS];  /* of GRAD: not used */
    int8_t usable;          /* else the reference kernel takes this row */
    int8_t is_cut;          /* reached through more than one grain */
    _Atomic int8_t left;    /* in this step */
    float *_Atomic step_at; /* where the step of a cut row was found in this step */
};

struct plan {
    int64_t rows;
    struct row *row;
    int64_t *shapes;
    double *step;           /* distinct values before the coming step, in order of appearance */
    int64_t steps;
};

/* What a row's tensors are at this moment. */
struct found {
    char *at[COLUMNS];
    int8_t dtype[COLUMNS];
};

static int8_t dtype_code(int32_t dtype) {
    if (dtype == torch_f32)
        return F32;
    if (dtype == torch_f64)
        return F64;
    if (dtype == torch_bf16)
        return BF16;
    return dtype == torch_f16 ? F16 : OTHER;
}

/* Whether the tensor is on the CPU and has these `dim` sizes and strides; then its dtype and where its data is. */
static int locate(handle tensor, int64_t dim, const int64_t *shape, int8_t *dtype, char **at) {
    int64_t its_dim, *sizes, *strides;
    int32_t code, device, layout;
    if (torch.get_layout(tensor, &layout) || layout != torch_strided || torch.get_dim(tensor, &its_dim) ||
        its_dim != dim || torch.get_sizes(tensor, &sizes) || torch.get_strides(tensor, &strides) ||
        torch.get_dtype(tensor, &code) || torch.get_device_type(tensor, &device) || device != torch_cpu)
        return 0;
    for (int64_t d = 0; d < dim; d++)
        if (sizes[d] != shape[d] || (sizes[d] != 1 && strides[d] != shape[dim + d]))
            return 0;
    *dtype = dtype_code(code);
    return *dtype != OTHER && !torch.get_data_ptr(tensor, (void **)at);
}

/* Finds the row's tensors; 0 where one of them is not what the plan was made for. */
static int find(const struct row *row, struct found *found) {
    for (int c = PARAM; c <= EXP_AVG_SQ; c++)
        if (!locate(row->tensor[c], row->dim, row->shape, &found->dtype[c], &found->at[c]) ||
            (c != GRAD && found->dtype[c] != row->dtype[c]))
            return 0;
    return locate(row->tensor[STEP], 0, NULL, &found->dtype[STEP], &found->at[STEP]) && found->dtype[STEP] == F32;
}

/* Whether sizes and strides cover numel consecutive elements, each once; `row_major`: in the order of the indices. */
static int is_dense(const struct row *row, int *row_major) {
    const int64_t *sizes = row->shape, *strides = row->shape + row->dim;
    int64_t expected = 1;
    *row_major = 1;
    for (int d = row->dim - 1; d >= 0; d--) {
        if (sizes[d] != 1 && strides[d] != expected)
            *row_major = 0;
        expected *= sizes[d];
    }
    if (*row_major || row->numel == 0)
        return 1;
    /* permuted: follow the strides upwards from 1 */
    int taken[MAX_DIM] = {0};
    for (int64_t stride = 1; stride < row->numel;) {
        int next = -1;
        for (int d = 0; d < row->dim; d++)
            if (!taken[d] && sizes[d] != 1 && strides[d] == stride)
                next = d;
        if (next < 0)
            return 0;
        taken[next] = 1;
        stride *= sizes[next];
    }
    return 1;
}

static int rounds_by_index(int8_t exp_avg_sq_dtype) {
    return exp_avg_sq_dtype == BF16 || exp_avg_sq_dtype == F16;
}

/* Whether the loops can take this row, whose shape is known: everything but the gradient, which is asked each step. */
static int is_usable(struct row *row, float *step) {
    char *at;
    int row_major;
    for (int c = PARAM; c <= EXP_AVG_SQ; c++)
        if (c != GRAD && !locate(row->tensor[c], row->dim, row->shape, &row->dtype[c], &at))
            return 0;
    if (!locate(row->tensor[STEP], 0, NULL, &row->dtype[STEP], &at) || row->dtype[STEP] != F32)
        return 0;
    *step = *(float *)at;
    return is_dense(row, &row_major) && (row_major || !rounds_by_index(row->dtype[EXP_AVG_SQ]));
}

EXPORT void sharded_adopt_plan_free(struct plan *plan) {
    for (int64_t i = 0; i < plan->rows && plan->row; i++)
        for (int c = 0; c < COLUMNS; c++)
            if (plan->row[i].tensor[c])
                torch.delete_tensor(plan->row[i].tensor[c]);
    free(plan->row);
    free(plan->shapes);
    free(plan->step);
    free(plan);
}

/* A plan without tensors, or NULL without memory. */
EXPORT struct plan *sharded_adopt_plan_new(int64_t rows) {
    struct plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return NULL;
    plan->rows = rows;
    plan->row = calloc((size_t)rows + 1, sizeof *plan->row);
    plan->step = calloc((size_t)rows + 1, sizeof *plan->step);
    if (plan->row && plan->step)
        return plan;
    sharded_adopt_plan_free(plan);
    return NULL;
}

static int32_t index_of_step(struct plan *plan, double step, int32_t guess) {
    if (guess < plan->steps && plan->step[guess] == step)
        return guess;
    int32_t i = 0;
    while (i < plan->steps && plan->step[i] != step)
        i++;
    if (i == plan->steps)
        plan->step[plan->steps++] = step;
    return i;
}

/* After the four columns are bound: notes each tensor's layout and each row's step, and writes 1 to usable[i] for every
 * row that can run here. `first_index`: where each tensor starts in its parameter, or NULL for 0. Returns 0, or 1 without
 * memory. */
EXPORT int32_t sharded_adopt_plan_seal(struct plan *plan, const int64_t *first_index, uint8_t *usable) {
    int64_t shape_numel = 0, dim, layout_ok, end = 0, *sizes, *strides;
    int32_t layout, step_index = 0;
    for (int64_t i = 0; i < plan->rows; i++) {
        struct row *row = &plan->row[i];
        layout_ok = !torch.get_layout(row->tensor[PARAM], &layout) && layout == torch_strided &&
            !torch.get_dim(row->tensor[PARAM], &dim) && dim <= MAX_DIM &&
            !torch.get_numel(row->tensor[PARAM], &row->numel);
        row->dim = layout_ok ? (int32_t)dim : -1;
        shape_numel += layout_ok ? 2 * dim : 0;
    }
    int64_t *shape = plan->shapes = malloc((size_t)(shape_numel + 1) * sizeof *shape);
    if (!shape)
        return 1;
    for (int64_t i = 0; i < plan->rows; i++) {
        struct row *row = &plan->row[i];
        row->first_index = first_index ? first_index[i] : 0;
        if (row->dim >= 0 && !torch.get_sizes(row->tensor[PARAM], &sizes) &&
            !torch.get_strides(row->tensor[PARAM], &strides)) {
            memcpy(shape, sizes, (size_t)row->dim * sizeof *shape);
            memcpy(shape + row->dim, strides, (size_t)row->dim * sizeof *shape);
            row->shape = shape;
            shape += 2 * row->dim;
            float step;
            row->usable = (int8_t)is_usable(row, &step);
            if (row->usable)
                row->step_index = step_index = index_of_step(plan, step, step_index);
        }
        usable[i] = (uint8_t)row->usable;
        row->is_cut = row->numel && end / GRAIN != (end + row->numel - 1) / GRAIN;
        end += row->numel;
        row->end = end;
    }
    return 0;
}

/* The distinct steps that the rows are at. */
EXPORT const double *sharded_adopt_plan_steps(const struct plan *plan, int64_t *count) {
    *count = plan->steps;
    return plan->step;
}

#endif
