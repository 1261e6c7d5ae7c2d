/* What the driver (adopt.c) and the element loops (lanes.h) say to each other. No torch header, no Python header. */
#ifndef SHARDED_ADOPT_RULE_H
#define SHARDED_ADOPT_RULE_H

#include <stdint.h>

enum dtype { F32 = 0, F64 = 1, BF16 = 2, F16 = 3, OTHER = -1 };
enum column { PARAM = 0, GRAD = 1, EXP_AVG = 2, EXP_AVG_SQ = 3, STEP = 4 };

enum flag {
    MAXIMIZE = 1,         /* g <- -g */
    UNSCALE = 2,          /* g <- g / grad_scale */
    L2 = 4,               /* g <- g + weight_decay * p */
    DECOUPLED = 8,        /* p <- p - lr * weight_decay * p */
    NESTEROV = 16,        /* the parameter moves by beta1 * m + (1 - beta1) * n */
    INIT_ELEMENT = 32,    /* an element with v == 0 takes v <- g^2 and nothing else of it moves */
};

/* The hyperparameters of one call, in double; fp32 lanes round each of them once. Python fills this through ctypes, so
 * the order and the types here are those of `_Rule` in fused.py. */
struct rule {
    double beta1, one_minus_beta1;
    double beta2, one_minus_beta2;
    double neg_lr;         /* -lr */
    double neg_lr_decay;   /* -lr * weight_decay, when decoupled */
    double weight_decay;   /* when L2 */
    double eps;
    double grad_scale;
    double step_increment; /* 1, or 0 for a dummy step */
    const double *clips;   /* one bound for each distinct step, +inf for none */
    int64_t flags;
};

/* Elements that lie next to each other in all four tensors and share dtypes and step. */
struct run {
    char *at[4];          /* PARAM, GRAD, EXP_AVG, EXP_AVG_SQ */
    int8_t dtype[4];
    uint32_t step;        /* before this update */
    int64_t numel;
    int64_t first_index;  /* of the run's first element in its parameter: for the rounding bits only */
    double clip;
};

static inline int64_t element_size(int8_t dtype) {
    return dtype == F64 ? 8 : dtype == F32 ? 4 : 2;
}

typedef void (*update_run)(const struct run *run, const struct rule *rule);

#endif
