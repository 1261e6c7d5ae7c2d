/* The update of consecutive elements, written once and compiled for each instruction set and for float and double.
 *
 * The includer defines REAL, FMA, SQRT, LANES(name), LANES_DTYPE and LANES_WIDTH. Every line is plain scalar C that the compiler turns into
 * vectors; the file is compiled without FP contraction, and a fused multiply-add stands only where FMA is written. So
 * the result of an element is the same in a vector, in its tail and on every instruction set: it depends on the
 * element's inputs alone. The FMAs stand where torch's own vector kernels have them (add with alpha, addcmul, lerp).
 *
 * The order of operations is that of reference.py. max and clamp are written so that NaN passes, as in torch.clamp.
 */

struct LANES(scalars) {
    REAL weight, beta2, one_minus_beta2, neg_lr, neg_lr_decay, weight_decay, eps, clip, grad_scale;
};

/* step 0: v <- g^2, and nothing else changes */
static void LANES(first)(const REAL *restrict g, REAL *restrict v, int64_t numel) {
    for (int64_t i = 0; i < numel; i++)
        v[i] = g[i] * g[i];
}

/* m + w * (n - m), from the nearer end as torch's lerp does it, which keeps it exact at w = 1 */
static ALWAYS_INLINE REAL LANES(lerp)(REAL m, REAL n, REAL w) {
    REAL far = n - m;
    return w < (REAL)0.5 ? FMA(w, far, m) : FMA(w - (REAL)1, far, n);
}

/* One element of a tensor of any dtype; the dtype is a compile-time constant in each caller that matters. */
static ALWAYS_INLINE REAL LANES(get)(const void *tensor, int64_t i, int dtype) {
    switch (dtype) {
    case F32: return (REAL)((const float *)tensor)[i];
    case F64: return (REAL)((const double *)tensor)[i];
    case BF16: return (REAL)float_of_bf16(((const uint16_t *)tensor)[i]);
    default: return (REAL)float_of_half(((const uint16_t *)tensor)[i]);
    }
}

/* Rounds to nearest. */
static ALWAYS_INLINE void LANES(put)(void *tensor, int64_t i, int dtype, REAL x) {
    switch (dtype) {
    case F32: ((float *)tensor)[i] = (float)x; break;
    case F64: ((double *)tensor)[i] = (double)x; break;
    case BF16: ((uint16_t *)tensor)[i] = bf16_of_float((float)x); break;
    default: ((uint16_t *)tensor)[i] = half_of_float((float)x); break;
    }
}

/* A 16-bit second moment is rounded up or down by chance: rounded to nearest, it would stand still at beta2 = 0.9999. */
static ALWAYS_INLINE void LANES(put_exp_avg_sq)(void *tensor, int64_t i, int dtype, REAL x, uint32_t low, uint32_t base) {
    const uint32_t random = rounding_bits(low + (uint32_t)i, base);
    if (dtype == BF16)
        ((uint16_t *)tensor)[i] = bf16_of_float_stochastic((float)x, random);
    else if (dtype == F16)
        ((uint16_t *)tensor)[i] = half_of_float_stochastic((float)x, random);
    else
        LANES(put)(tensor, i, dtype, x);
}

/* Every later step. Flags and dtypes are compile-time constants in each caller, so the loop holds no branch. `low` and
 * `base`: the first element's index as rounding_bits takes it. */
static ALWAYS_INLINE void LANES(later)(
    void *restrict p, const void *restrict g, void *restrict m, void *restrict v, int64_t numel,
    struct LANES(scalars) s, uint32_t low, uint32_t base, int flags, int p_dtype, int g_dtype, int m_dtype, int v_dtype
) {
    for (int64_t i = 0; i < numel; i++) {
        const REAL p_old = LANES(get)(p, i, p_dtype), g_i = LANES(get)(g, i, g_dtype);
        const REAL m_old = LANES(get)(m, i, m_dtype), v_old = LANES(get)(v, i, v_dtype);
        REAL denom = SQRT(v_old);
        denom = denom < s.eps ? s.eps : denom;
        REAL n = g_i / denom;
        n = n < -s.clip ? -s.clip : n;
        n = n > s.clip ? s.clip : n;
        REAL moved = flags & DECOUPLED ? FMA(p_old, s.neg_lr_decay, p_old) : p_old;
        REAL m_new = LANES(lerp)(m_old, n, s.weight);
        REAL along = flags & NESTEROV ? LANES(lerp)(m_new, n, s.weight) : m_new;
        REAL p_new = FMA(along, s.neg_lr, moved);
        REAL v_new = FMA(s.one_minus_beta2 * g_i, g_i, v_old * s.beta2);
        if (flags & INIT_ELEMENT) {
            int fresh = v_old == 0;
            v_new = fresh ? g_i * g_i : v_new;
            m_new = fresh ? m_old : m_new;
            p_new = fresh ? p_old : p_new;
        }
        LANES(put)(p, i, p_dtype, p_new);
        LANES(put)(m, i, m_dtype, m_new);
        LANES(put_exp_avg_sq)(v, i, v_dtype, v_new, low, base);
    }
}

/* All four in the type of the lanes. */
static void LANES(same)(
    REAL *restrict p, const REAL *restrict g, REAL *restrict m, REAL *restrict v, int64_t numel,
    const struct LANES(scalars) *s, int64_t flags
) {
#define SAME(FLAGS)                                                                                                \
    LANES(later)(p, g, m, v, numel, *s, 0, 0, FLAGS, LANES_DTYPE, LANES_DTYPE, LANES_DTYPE, LANES_DTYPE);          \
    break
    switch (flags & (DECOUPLED | NESTEROV | INIT_ELEMENT)) {
    case 0: SAME(0);
    case DECOUPLED: SAME(DECOUPLED);
    case NESTEROV: SAME(NESTEROV);
    case DECOUPLED | NESTEROV: SAME(DECOUPLED | NESTEROV);
    case INIT_ELEMENT: SAME(INIT_ELEMENT);
    case DECOUPLED | INIT_ELEMENT: SAME(DECOUPLED | INIT_ELEMENT);
    case NESTEROV | INIT_ELEMENT: SAME(NESTEROV | INIT_ELEMENT);
    default: SAME(DECOUPLED | NESTEROV | INIT_ELEMENT);
    }
#undef SAME
}

/* The last elements that do not fill a vector go through one that is filled up: one by one they would take as long as a
 * dozen vectors, which shows in lists of small tensors. */
static void LANES(update)(
    REAL *restrict p, const REAL *restrict g, REAL *restrict m, REAL *restrict v, int64_t numel,
    const struct LANES(scalars) *s, int64_t flags
) {
    const int64_t rest = numel % LANES_WIDTH, whole = numel - rest;
    LANES(same)(p, g, m, v, whole, s, flags);
    if (rest) {
        REAL last[4][LANES_WIDTH] = {{0}};
        const size_t bytes = (size_t)rest * sizeof(REAL);
        memcpy(last[0], p + whole, bytes);
        memcpy(last[1], g + whole, bytes);
        memcpy(last[2], m + whole, bytes);
        memcpy(last[3], v + whole, bytes);
        LANES(same)(last[0], last[1], last[2], last[3], LANES_WIDTH, s, flags);
        memcpy(p + whole, last[0], bytes);
        memcpy(m + whole, last[2], bytes);
        memcpy(v + whole, last[3], bytes);
    }
}

/* What comes before the rule: the loss scale, the sign, the decay that is part of the gradient. */
static void LANES(prepare)(
    REAL *out, const REAL *g, const REAL *restrict p, int64_t numel, const struct LANES(scalars) *s, int64_t flags
) {
    if (out != g)
        memcpy(out, g, (size_t)numel * sizeof(REAL));
    if (flags & UNSCALE)
        for (int64_t i = 0; i < numel; i++)
            out[i] = out[i] / s->grad_scale;
    if (flags & MAXIMIZE)
        for (int64_t i = 0; i < numel; i++)
            out[i] = -out[i];
    if (flags & L2)
        for (int64_t i = 0; i < numel; i++)
            out[i] = FMA(p[i], s->weight_decay, out[i]);
}

static void LANES(load)(REAL *restrict out, const void *tensor, int8_t dtype, int64_t begin, int64_t numel) {
#define LOAD(DTYPE)                                            \
    for (int64_t i = 0; i < numel; i++)                        \
        out[i] = LANES(get)(tensor, begin + i, DTYPE);         \
    break
    switch (dtype) {
    case F32: LOAD(F32);
    case F64: LOAD(F64);
    case BF16: LOAD(BF16);
    default: LOAD(F16);
    }
#undef LOAD
}

static void LANES(store)(void *tensor, const REAL *restrict in, int8_t dtype, int64_t begin, int64_t numel) {
#define STORE(DTYPE)                                           \
    for (int64_t i = 0; i < numel; i++)                        \
        LANES(put)(tensor, begin + i, DTYPE, in[i]);           \
    break
    switch (dtype) {
    case F32: STORE(F32);
    case F64: STORE(F64);
    case BF16: STORE(BF16);
    default: STORE(F16);
    }
#undef STORE
}

static void LANES(store_exp_avg_sq)(
    uint16_t *tensor, const REAL *restrict in, int8_t dtype, int64_t numel, uint32_t low, uint32_t base
) {
    if (dtype == BF16)
        for (int64_t i = 0; i < numel; i++)
            LANES(put_exp_avg_sq)(tensor, i, BF16, in[i], low, base);
    else
        for (int64_t i = 0; i < numel; i++)
            LANES(put_exp_avg_sq)(tensor, i, F16, in[i], low, base);
}

#if LANES_DTYPE == 0 /* F32 */
/* The mixtures that training uses have loops of their own, without buffers; returns how many elements they took. */
static int64_t LANES(mixed)(
    char *const at[4], const int8_t dtype[4], int64_t numel, const struct LANES(scalars) *s, uint32_t low, uint32_t base,
    int64_t flags
) {
    const int64_t whole = numel - numel % LANES_WIDTH;
    const int all = dtype[PARAM] | dtype[GRAD] << 4 | dtype[EXP_AVG] << 8 | dtype[EXP_AVG_SQ] << 12;
#define MIXED(P, G, M, V)                                                                            \
    case P | G << 4 | M << 8 | V << 12:                                                              \
        if (flags == 0)                                                                              \
            LANES(later)(at[0], at[1], at[2], at[3], whole, *s, low, base, 0, P, G, M, V);           \
        else if (flags == DECOUPLED)                                                                 \
            LANES(later)(at[0], at[1], at[2], at[3], whole, *s, low, base, DECOUPLED, P, G, M, V);   \
        else                                                                                         \
            return 0;                                                                                \
        return whole
    switch (all) {
        MIXED(BF16, BF16, F32, F32);
        MIXED(F16, F16, F32, F32);
        MIXED(F32, BF16, F32, F32);
        MIXED(BF16, BF16, BF16, BF16);
        MIXED(F32, F32, F32, BF16);
        MIXED(F32, F32, BF16, BF16);
    default: return 0;
    }
#undef MIXED
}
#endif

/* One run. Tensors that all have the type of the lanes are updated where they lie, others in their own loops or through
 * buffers that stay in the first-level cache. */
static void LANES(run)(const struct run *run, const struct rule *rule) {
    enum { BLOCK = 4096 / sizeof(REAL) };
    REAL buffers[4][BLOCK] __attribute__((aligned(64)));
    const struct LANES(scalars) s = {
        .weight = (REAL)rule->one_minus_beta1,
        .beta2 = (REAL)rule->beta2,
        .one_minus_beta2 = (REAL)rule->one_minus_beta2,
        .neg_lr = (REAL)rule->neg_lr,
        .neg_lr_decay = (REAL)rule->neg_lr_decay,
        .weight_decay = (REAL)rule->weight_decay,
        .eps = (REAL)rule->eps,
        .clip = (REAL)run->clip,
        .grad_scale = (REAL)rule->grad_scale,
    };
    const int prepared = (rule->flags & (UNSCALE | MAXIMIZE | L2)) != 0;
    int64_t at = 0;
    int same = 1;
    for (int c = 0; c < 4; c++)
        same = same && run->dtype[c] == LANES_DTYPE;
    if (same && !prepared && run->step != 0) {
        LANES(update)(
            (REAL *)run->at[PARAM], (REAL *)run->at[GRAD], (REAL *)run->at[EXP_AVG], (REAL *)run->at[EXP_AVG_SQ],
            run->numel, &s, rule->flags
        );
        return;
    }
    while (at < run->numel) {
        const uint64_t index = (uint64_t)(run->first_index + at);
        const uint32_t low = (uint32_t)index, base = rounding_base(index, run->step);
        int64_t n = run->numel - at;
        if (n > (int64_t)1 << 30)
            n = (int64_t)1 << 30;
        if ((uint64_t)n > 0x100000000u - low) /* up to where the upper half of the index changes */
            n = (int64_t)(0x100000000u - low);
#if LANES_DTYPE == 0
        if (!prepared && run->step != 0) {
            char *start[4];
            for (int c = 0; c < 4; c++)
                start[c] = run->at[c] + at * element_size(run->dtype[c]);
            const int64_t taken = LANES(mixed)(start, run->dtype, n, &s, low, base, rule->flags);
            if (taken) {
                at += taken;
                continue;
            }
        }
#endif
        n = n < BLOCK ? n : BLOCK;
        REAL *x[4];
        for (int c = 0; c < 4; c++) {
            if (run->dtype[c] == LANES_DTYPE) {
                x[c] = (REAL *)run->at[c] + at;
            } else {
                x[c] = buffers[c];
                LANES(load)(x[c], run->at[c], run->dtype[c], at, n);
            }
        }
        if (prepared) {
            LANES(prepare)(buffers[GRAD], x[GRAD], x[PARAM], n, &s, rule->flags);
            x[GRAD] = buffers[GRAD];
        }
        if (run->step == 0) {
            LANES(first)(x[GRAD], x[EXP_AVG_SQ], n);
        } else {
            LANES(update)(x[PARAM], x[GRAD], x[EXP_AVG], x[EXP_AVG_SQ], n, &s, rule->flags);
            for (int c = PARAM; c <= EXP_AVG; c += EXP_AVG - PARAM)
                if (run->dtype[c] != LANES_DTYPE)
                    LANES(store)(run->at[c], x[c], run->dtype[c], at, n);
        }
        const int8_t v_dtype = run->dtype[EXP_AVG_SQ];
        if (v_dtype == BF16 || v_dtype == F16)
            LANES(store_exp_avg_sq)
            ((uint16_t *)run->at[EXP_AVG_SQ] + at, x[EXP_AVG_SQ], v_dtype, n, low, base);
        else if (v_dtype != LANES_DTYPE)
            LANES(store)(run->at[EXP_AVG_SQ], x[EXP_AVG_SQ], v_dtype, at, n);
        at += n;
    }
}

#undef REAL
#undef FMA
#undef SQRT
#undef LANES
#undef LANES_DTYPE
#undef LANES_WIDTH
