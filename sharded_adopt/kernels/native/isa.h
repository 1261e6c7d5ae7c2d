/* update_<ISA>: the float and the double lanes under the target that the includer has set. */

#define REAL float
#define FMA __builtin_fmaf
#define SQRT __builtin_sqrtf
#define LANES(name) CONCAT(CONCAT(f32_, ISA), _##name)
#define LANES_DTYPE 0 /* F32, as a number that the preprocessor can compare */
#define LANES_WIDTH 16 /* of the widest vector */
#include "lanes.h"

#define REAL double
#define FMA __builtin_fma
#define SQRT __builtin_sqrt
#define LANES(name) CONCAT(CONCAT(f64_, ISA), _##name)
#define LANES_DTYPE 1 /* F64 */
#define LANES_WIDTH 8
#include "lanes.h"

/* An fp64 parameter or moment makes the lanes fp64; all else is computed in fp32. */
static void CONCAT(update_, ISA)(const struct run *run, const struct rule *rule) {
    int wide = 0;
    for (int c = 0; c < 4; c++)
        wide = wide || (c != GRAD && run->dtype[c] == F64);
    (wide ? CONCAT(CONCAT(f64_, ISA), _run) : CONCAT(CONCAT(f32_, ISA), _run))(run, rule);
}
