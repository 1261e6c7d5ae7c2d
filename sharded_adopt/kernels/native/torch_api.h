/* The C functions of LibTorch that are used here, by address.
 *
 * They are part of what LibTorch calls its stable ABI (aoti_torch_*, torch_list_*, torch_library_*, torch_parallel_for) and
 * are declared here by hand, so that no header of torch is needed to build. All return 0 when they succeed.
 */
#ifndef SHARDED_ADOPT_TORCH_API_H
#define SHARDED_ADOPT_TORCH_API_H

#include <stddef.h>
#include <stdint.h>

typedef uint64_t stable_value;
typedef void *handle;

/* Filled by Python by name, so the order is that of `_TORCH_FUNCTIONS` in native/__init__.py. */
static struct {
    int32_t (*init_fragment)(const char *ns, const char *file, uint32_t line, handle *library);
    int32_t (*init_impl)(const char *ns, const char *key, const char *file, uint32_t line, handle *library);
    int32_t (*library_def)(handle library, const char *schema);
    int32_t (*library_impl)(
        handle library, const char *name, void (*fn)(stable_value *, uint64_t, uint64_t), uint64_t torch_version
    );
    int32_t (*list_size)(handle list, size_t *size);
    int32_t (*list_get_item)(handle list, size_t i, stable_value *item);
    int32_t (*delete_list)(handle list);
    int32_t (*delete_tensor)(handle tensor);
    int32_t (*get_data_ptr)(handle tensor, void **at);
    int32_t (*get_dim)(handle tensor, int64_t *dim);
    int32_t (*get_numel)(handle tensor, int64_t *numel);
    int32_t (*get_sizes)(handle tensor, int64_t **sizes);
    int32_t (*get_strides)(handle tensor, int64_t **strides);
    int32_t (*get_dtype)(handle tensor, int32_t *dtype);
    int32_t (*get_device_type)(handle tensor, int32_t *type);
    int32_t (*get_layout)(handle tensor, int32_t *layout);
    int32_t (*dtype_float32)(void);
    int32_t (*dtype_float64)(void);
    int32_t (*dtype_bfloat16)(void);
    int32_t (*dtype_float16)(void);
    int32_t (*device_type_cpu)(void);
    int32_t (*layout_strided)(void);
    int32_t (*get_num_threads)(uint32_t *threads);
    int32_t (*parallel_for)(
        int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void *), void *context
    );
} torch;

static int32_t torch_f32, torch_f64, torch_bf16, torch_f16, torch_cpu, torch_strided;

#endif
