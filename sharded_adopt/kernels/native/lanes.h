/* The update of consecutive elements, written once and compiled for each instruction set and for float and double.
 *
 * The includer defines REAL, FMA, SQRT and LANES(name). Every line is plain scalar C that the compiler turns into
 * vectors; the file is compiled without FP contraction, and a fused multiply-add stands only where FMA is written. So
 * the result of an element is the same in a vector, in its tail and on every instruction set: it depends on the
 * element's inputs alone. The FMAs stand where torch's own vector kernels have them (add with alpha, addcmul, lerp).
 *
 * The order of operations is that of reference.py. max and clamp are written so that NaN passes, as in torch.clamp.
 */

struct LANES(scalars) {
    REAL beta1, weight, beta2, one_minus_beta2, neg_lr, neg_lr_decay, weight_decay, eps, clip, grad_scale;
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

/* Every later step. The flags are compile-time constants in each caller, so no loop holds a branch. */
static ALWAYS_INLINE void LANES(later)(
    REAL *restrict p, const REAL *restrict g, REAL *restrict m, REAL *restrict v, int64_t numel,
    struct LANES(scalars) s, int decoupled, int nesterov, int by_element
) {
    for (int64_t i = 0; i < numel; i++) {
        REAL denom = SQRT(v[i]);
        denom = denom < s.eps ? s.eps : denom;
        REAL n = g[i] / denom;
        n = n < -s.clip ? -s.clip : n;
        n = n > s.clip ? s.clip : n;
        REAL moved = decoupled ? FMA(p[i], s.neg_lr_decay, p[i]) : p[i];
        REAL m_new = LANES(lerp)(m[i], n, s.weight);
        REAL along = nesterov ? LANES(lerp)(m_new, n, s.weight) : m_new;
        REAL p_new = FMA(along, s.neg_lr, moved);
        REAL v_new = FMA(s.one_minus_beta2 * g[i], g[i], v[i] * s.beta2);
        if (by_element) {
            int fresh = v[i] == 0;
            v_new = fresh ? g[i] * g[i] : v_new;
            m_new = fresh ? m[i] : m_new;
            p_new = fresh ? p[i] : p_new;
        }
        p[i] = p_new;
        m[i] = m_new;
        v[i] = v_new;
    }
}

static ALWAYS_INLINE void LANES(by_flags)(
    REAL *restrict p, const REAL *restrict g, REAL *restrict m, REAL *restrict v, int64_t numel,
    const struct LANES(scalars) *s, int64_t flags
) {
    switch (flags & (DECOUPLED | NESTEROV | INIT_ELEMENT)) {
    case 0: LANES(later)(p, g, m, v, numel, *s, 0, 0, 0); break;
    case DECOUPLED: LANES(later)(p, g, m, v, numel, *s, 1, 0, 0); break;
    case NESTEROV: LANES(later)(p, g, m, v, numel, *s, 0, 1, 0); break;
    case DECOUPLED | NESTEROV: LANES(later)(p, g, m, v, numel, *s, 1, 1, 0); break;
    case INIT_ELEMENT: LANES(later)(p, g, m, v, numel, *s, 0, 0, 1); break;
    case DECOUPLED | INIT_ELEMENT: LANES(later)(p, g, m, v, numel, *s, 1, 0, 1); break;
    case NESTEROV | INIT_ELEMENT: LANES(later)(p, g, m, v, numel, *s, 0, 1, 1); break;
    default: LANES(later)(p, g, m, v, numel, *s, 1, 1, 1); break;
    }
}

/* The last elements that do not fill a vector go through one that is filled up: one by one they would take as long as a
 * dozen vectors, which shows in lists of small tensors. */
static void LANES(update)(
    REAL *restrict p, const REAL *restrict g, REAL *restrict m, REAL *restrict v, int64_t numel,
    const struct LANES(scalars) *s, int64_t flags
) {
    enum { VECTOR = 64 / sizeof(REAL) };
    const int64_t rest = numel % VECTOR, whole = numel - rest;
    LANES(by_flags)(p, g, m, v, whole, s, flags);
    if (rest) {
        REAL last[4][VECTOR] = {{0}};
        const size_t bytes = (size_t)rest * sizeof(REAL);
        memcpy(last[0], p + whole, bytes);
        memcpy(last[1], g + whole, bytes);
        memcpy(last[2], m + whole, bytes);
        memcpy(last[3], v + whole, bytes);
        LANES(by_flags)(last[0], last[1], last[2], last[3], VECTOR, s, flags);
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

static void LANES(load)(REAL *restrict out, const void *from, int8_t dtype, int64_t begin, int64_t numel) {
    switch (dtype) {
    case F32: {
        const float *in = (const float *)from + begin;
        for (int64_t i = 0; i < numel; i++)
            out[i] = (REAL)in[i];
        break;
    }
    case F64: {
        const double *in = (const double *)from + begin;
        for (int64_t i = 0; i < numel; i++)
            out[i] = (REAL)in[i];
        break;
    }
    case BF16: {
        const uint16_t *in = (const uint16_t *)from + begin;
        for (int64_t i = 0; i < numel; i++)
            out[i] = (REAL)float_of_bf16(in[i]);
        break;
    }
    default: {
        const uint16_t *in = (const uint16_t *)from + begin;
        for (int64_t i = 0; i < numel; i++)
            out[i] = (REAL)float_of_half(in[i]);
        break;
    }
    }
}

static void LANES(store)(void *to, const REAL *restrict in, int8_t dtype, int64_t begin, int64_t numel) {
    switch (dtype) {
    case F32: {
        float *out = (float *)to + begin;
        for (int64_t i = 0; i < numel; i++)
            out[i] = (float)in[i];
        break;
    }
    case F64: {
        double *out = (double *)to + begin;
        for (int64_t i = 0; i < numel; i++)
            out[i] = (double)in[i];
        break;
    }
    case BF16: {
        uint16_t *out = (uint16_t *)to + begin;
        for (int64_t i = 0; i < numel; i++)
            out[i] = bf16_of_float((float)in[i]);
        break;
    }
    default: {
        uint16_t *out = (uint16_t *)to + begin;
        for (int64_t i = 0; i < numel; i++)
            out[i] = half_of_float((float)in[i]);
        break;
    }
    }
}

/* A 16-bit second moment is rounded up or down by chance: rounded to nearest, it would stand still at beta2 = 0.9999. */
static void LANES(store_stochastic)(
    void *to, const REAL *restrict in, int8_t dtype, int64_t begin, int64_t numel, int64_t first_index, uint32_t step
) {
    uint16_t *out = (uint16_t *)to + begin;
    uint64_t index = (uint64_t)(first_index + begin);
    if (dtype == BF16)
        for (int64_t i = 0; i < numel; i++)
            out[i] = bf16_of_float_stochastic((float)in[i], rounding_bits(index + (uint64_t)i, step));
    else
        for (int64_t i = 0; i < numel; i++)
            out[i] = half_of_float_stochastic((float)in[i], rounding_bits(index + (uint64_t)i, step));
}

/* One run. A tensor that already has the type of the lanes is updated where it lies; the others pass
 * through buffers that stay in the first-level cache. */
static void LANES(run)(const struct run *run, const struct rule *rule) {
    const int64_t numel = run->numel;
    enum { BLOCK = 4096 / sizeof(REAL) };
    REAL buffers[4][BLOCK] __attribute__((aligned(64)));
    const struct LANES(scalars) s = {
        .beta1 = (REAL)rule->beta1,
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
    int direct = !prepared;
    for (int c = 0; c < 4; c++)
        direct = direct && run->dtype[c] == LANES_DTYPE;
    const int64_t block = direct ? numel : BLOCK;
    for (int64_t at = 0; at < numel; at += block) {
        const int64_t n = numel - at < block ? numel - at : block;
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
            LANES(store_stochastic)(run->at[EXP_AVG_SQ], x[EXP_AVG_SQ], v_dtype, at, n, run->first_index, run->step);
        else if (v_dtype != LANES_DTYPE)
            LANES(store)(run->at[EXP_AVG_SQ], x[EXP_AVG_SQ], v_dtype, at, n);
    }
}

#undef REAL
#undef FMA
#undef SQRT
#undef LANES
#undef LANES_DTYPE
