// oneDNN: matmul with weights in whatever packed form it asks for at that number of rows, chosen anew for each.
// Variants: f32; s8 (signed 8-bit weights with one scale an output; x is quantised to signed 8 bits with one scale
// known beforehand, and that is timed, as it is for everyone). ONEDNN_MAX_CPU_ISA limits the instruction set from
// outside. Version 2 takes scales when a primitive is made, version 3 when it runs.
#include "reference.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <dnnl.hpp>
#include <unordered_map>
#include <vector>

namespace
{
using dnnl::memory;
using arguments = std::unordered_map<int, memory>;
using type = memory::data_type;

constexpr float x_scale = 1.0f / 127; // x lies in [-1, 1)

struct layer {
    dnnl::matmul product;
    arguments args;
};

struct shape_state {
    dnnl::reorder quantise;
    arguments quantise_args;
    std::vector<layer> layers;
};

struct library {
    dnnl::engine engine{dnnl::engine::kind::cpu, 0};
    dnnl::stream stream{engine};
    bool s8 = false;
    shape_state shapes[REFERENCE_SHAPES];
};
library *lib;

bool open(const char *variant, uint32_t n_threads, const char **why)
{
    (void)n_threads; // OMP_NUM_THREADS, which main.c has checked
    *why = "oneDNN's variants are f32 and s8";
    if (std::strcmp(variant, "f32") != 0 && std::strcmp(variant, "s8") != 0)
        return false;
    lib = new library;
    lib->s8 = std::strcmp(variant, "s8") == 0;
    return true;
}

memory::desc row_major(int64_t rows, int64_t columns, type t)
{
    return {{rows, columns}, t, memory::dims{columns, 1}};
}

// Rounds w [n_out][n_in] to multiples of a scale an output, in place of the codes; returns the scales.
std::vector<float> to_codes(const reference_shape &s, std::vector<float> &w)
{
    std::vector<float> scales(s.n_out);
    for (uint32_t n = 0; n < s.n_out; n++) {
        float *row = w.data() + size_t(n) * s.n_in, top = 0;
        for (uint32_t k = 0; k < s.n_in; k++)
            top = std::fmax(top, std::fabs(row[k]));
        scales[n] = top / 127;
        for (uint32_t k = 0; k < s.n_in; k++)
            row[k] = std::nearbyint(row[k] / scales[n]);
    }
    return scales;
}

#if DNNL_VERSION_MAJOR >= 3
memory floats(const std::vector<float> &values)
{
    memory m({{int64_t(values.size())}, type::f32, memory::dims{1}}, lib->engine);
    std::memcpy(m.get_data_handle(), values.data(), values.size() * sizeof(float));
    return m;
}

dnnl::matmul::primitive_desc describe_product(const memory::desc &x, const memory::desc &w, const memory::desc &y,
                                              const std::vector<float> &scales, arguments &args)
{
    dnnl::primitive_attr a;
    if (lib->s8) {
        a.set_scales_mask(DNNL_ARG_SRC, 0);
        a.set_scales_mask(DNNL_ARG_WEIGHTS, 1 << 1);
        args[DNNL_ARG_ATTR_SCALES | DNNL_ARG_SRC] = floats({x_scale});
        args[DNNL_ARG_ATTR_SCALES | DNNL_ARG_WEIGHTS] = floats(scales);
    }
    return {lib->engine, x, w, y, a};
}

dnnl::reorder quantiser(const memory &from, const memory &to, arguments &args)
{
    dnnl::primitive_attr a;
    a.set_scales_mask(DNNL_ARG_DST, 0);
    args[DNNL_ARG_ATTR_SCALES | DNNL_ARG_DST] = floats({x_scale});
    return dnnl::reorder(dnnl::reorder::primitive_desc(from, to, a));
}
#else
dnnl::matmul::primitive_desc describe_product(const memory::desc &x, const memory::desc &w, const memory::desc &y,
                                              const std::vector<float> &scales, arguments &)
{
    dnnl::primitive_attr a;
    if (lib->s8) {
        std::vector<float> both(scales);
        for (float &s : both)
            s *= x_scale;
        a.set_output_scales(1 << 1, both);
    }
    return {dnnl::matmul::desc(x, w, y), a, lib->engine};
}

dnnl::reorder quantiser(const memory &from, const memory &to, arguments &)
{
    dnnl::primitive_attr a;
    a.set_output_scales(0, {1 / x_scale});
    return dnnl::reorder(dnnl::reorder::primitive_desc(from, to, a));
}
#endif

layer make_layer(uint32_t shape, uint32_t l, const memory &x, const memory &y)
{
    const reference_shape &s = reference_shapes[shape];
    const type code = lib->s8 ? type::s8 : type::f32;
    std::vector<float> w(size_t(s.n_out) * s.n_in), scales;
    reference_weights(shape, l, 0, s.n_out, w.data());
    if (lib->s8)
        scales = to_codes(s, w);
    // W [n_out][n_in] read as [n_in][n_out]: the product is x W^T.
    const memory::desc plain({s.n_in, s.n_out}, type::f32, memory::dims{1, s.n_in});
    const memory::desc any({s.n_in, s.n_out}, code, memory::format_tag::any);
    layer made;
    const auto described = describe_product(x.get_desc(), any, y.get_desc(), scales, made.args);
    memory from(plain, lib->engine, w.data()), to(described.weights_desc(), lib->engine);
    dnnl::reorder(from, to).execute(lib->stream, from, to);
    lib->stream.wait();
    made.product = dnnl::matmul(described);
    made.args[DNNL_ARG_SRC] = x;
    made.args[DNNL_ARG_WEIGHTS] = to;
    made.args[DNNL_ARG_DST] = y;
    return made;
}

bool products(uint32_t n_rows, const float *x, float *y, const char **why)
try {
    for (uint32_t i = 0; i < REFERENCE_SHAPES; i++) {
        const reference_shape &s = reference_shapes[i];
        shape_state &state = lib->shapes[i];
        state = shape_state();
        memory in(row_major(n_rows, s.n_in, type::f32), lib->engine, const_cast<float *>(x));
        const memory out(row_major(n_rows, s.n_out, type::f32), lib->engine, y);
        if (lib->s8) {
            const memory codes(row_major(n_rows, s.n_in, type::s8), lib->engine);
            state.quantise = quantiser(in, codes, state.quantise_args);
            state.quantise_args[DNNL_ARG_FROM] = in;
            state.quantise_args[DNNL_ARG_TO] = codes;
            in = codes;
        }
        for (uint32_t l = 0; l < s.n_layers; l++)
            state.layers.push_back(make_layer(i, l, in, out));
    }
    return true;
} catch (const dnnl::error &e) {
    std::fprintf(stderr, "oneDNN: %s\n", e.what());
    *why = "oneDNN refused";
    return false;
}

void product_run(uint32_t shape)
{
    const shape_state &state = lib->shapes[shape];
    for (const layer &l : state.layers) {
        if (lib->s8)
            state.quantise.execute(lib->stream, state.quantise_args);
        l.product.execute(lib->stream, l.args);
    }
    lib->stream.wait();
}

const char *isa_name()
{
    const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
    return isa >= dnnl::cpu_isa::avx512_core_amx    ? "AMX"
           : isa >= dnnl::cpu_isa::avx512_core_vnni ? "AVX-512 VNNI"
           : isa >= dnnl::cpu_isa::avx512_core      ? "AVX-512"
                                                    : "AVX2 or less";
}

void describe(char *text, uint32_t text_bytes)
{
    const dnnl_version_t *v = dnnl_version();
    std::snprintf(text, text_bytes, "oneDNN %d.%d.%d, %s", v->major, v->minor, v->patch, isa_name());
}
} // namespace

extern "C" const reference_engine reference_onednn = {"onednn", open,    products, product_run,
                                                      nullptr,  nullptr, describe};
