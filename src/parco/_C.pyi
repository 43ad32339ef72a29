from collections.abc import Sequence


def attention_generic(q: int, q_stride: Sequence[int], keys: int, key_stride: Sequence[int], values: int, value_stride: Sequence[int], y: int, logs: int, sizes: Sequence[int], scale: float, causal: bool, type: int, threads: int, mask: int, mask_stride: Sequence[int], p: float, seed: int) -> None:
    """
    Attention in tiles; sizes are batch, heads, key heads, queries, keys, width; csrc/attention/attention.h.
    """

def attention_avx2(q: int, q_stride: Sequence[int], keys: int, key_stride: Sequence[int], values: int, value_stride: Sequence[int], y: int, logs: int, sizes: Sequence[int], scale: float, causal: bool, type: int, threads: int, mask: int, mask_stride: Sequence[int], p: float, seed: int) -> None:
    """
    Attention in tiles; sizes are batch, heads, key heads, queries, keys, width; csrc/attention/attention.h.
    """

def attention_avx512(q: int, q_stride: Sequence[int], keys: int, key_stride: Sequence[int], values: int, value_stride: Sequence[int], y: int, logs: int, sizes: Sequence[int], scale: float, causal: bool, type: int, threads: int, mask: int, mask_stride: Sequence[int], p: float, seed: int) -> None:
    """
    Attention in tiles; sizes are batch, heads, key heads, queries, keys, width; csrc/attention/attention.h.
    """

def attention_grad_generic(grad: int, grad_stride: Sequence[int], q: int, q_stride: Sequence[int], keys: int, key_stride: Sequence[int], values: int, value_stride: Sequence[int], y: int, logs: int, grad_q: int, grad_keys: int, grad_values: int, sizes: Sequence[int], scale: float, causal: bool, type: int, threads: int, mask: int, mask_stride: Sequence[int], p: float, seed: int) -> None:
    """The gradients of attention in tiles; csrc/attention/attention.h."""

def attention_grad_avx2(grad: int, grad_stride: Sequence[int], q: int, q_stride: Sequence[int], keys: int, key_stride: Sequence[int], values: int, value_stride: Sequence[int], y: int, logs: int, grad_q: int, grad_keys: int, grad_values: int, sizes: Sequence[int], scale: float, causal: bool, type: int, threads: int, mask: int, mask_stride: Sequence[int], p: float, seed: int) -> None:
    """The gradients of attention in tiles; csrc/attention/attention.h."""

def attention_grad_avx512(grad: int, grad_stride: Sequence[int], q: int, q_stride: Sequence[int], keys: int, key_stride: Sequence[int], values: int, value_stride: Sequence[int], y: int, logs: int, grad_q: int, grad_keys: int, grad_values: int, sizes: Sequence[int], scale: float, causal: bool, type: int, threads: int, mask: int, mask_stride: Sequence[int], p: float, seed: int) -> None:
    """The gradients of attention in tiles; csrc/attention/attention.h."""

class CastCall:
    """One cast; csrc/cast/cast.h."""

def cast_call(*, x: int, scale: int, zero: int, factor: int, entries: int, codes: int, rows: int, columns: int, group: int, block_rows: int, scale_stride: int, seed: int, kind: int, rule: int, rounding: int, rescaling: int, bits: int, mantissa_bits: int, least_exponent: int, max_code: int, nan_code: int, least: int, greatest: int, offset: int, largest: float, greatest_exponent: int, x_type: int, scale_type: int, threads: int) -> CastCall:
    """One cast, of tensors by their addresses."""

def cast_generic(call: CastCall) -> None:
    """Numbers into codes; csrc/cast/cast.h."""

def cast_avx2(call: CastCall) -> None:
    """Numbers into codes; csrc/cast/cast.h."""

def cast_avx512(call: CastCall) -> None:
    """Numbers into codes; csrc/cast/cast.h."""

def tiles_generic(rows: CastCall, columns: CastCall, row_size: int, column_size: int, signs: int) -> None:
    """Numbers into codes, by rows and transposed; csrc/cast/cast.h."""

def tiles_avx2(rows: CastCall, columns: CastCall, row_size: int, column_size: int, signs: int) -> None:
    """Numbers into codes, by rows and transposed; csrc/cast/cast.h."""

def tiles_avx512(rows: CastCall, columns: CastCall, row_size: int, column_size: int, signs: int) -> None:
    """Numbers into codes, by rows and transposed; csrc/cast/cast.h."""

def amax_generic(x: int, amax: int, rows: int, columns: int, group: int, x_type: int, threads: int) -> None:
    """Greatest magnitudes; csrc/cast/cast.h."""

def amax_avx2(x: int, amax: int, rows: int, columns: int, group: int, x_type: int, threads: int) -> None:
    """Greatest magnitudes; csrc/cast/cast.h."""

def amax_avx512(x: int, amax: int, rows: int, columns: int, group: int, x_type: int, threads: int) -> None:
    """Greatest magnitudes; csrc/cast/cast.h."""

def greatest_generic(x: int, amax: int, rows: int, columns: int, group: int, x_type: int, threads: int) -> None:
    """Greatest magnitudes; csrc/cast/cast.h."""

def greatest_avx2(x: int, amax: int, rows: int, columns: int, group: int, x_type: int, threads: int) -> None:
    """Greatest magnitudes; csrc/cast/cast.h."""

def greatest_avx512(x: int, amax: int, rows: int, columns: int, group: int, x_type: int, threads: int) -> None:
    """Greatest magnitudes; csrc/cast/cast.h."""

def decode_generic(*, codes: int, values: int, scale: int, zero: int, factor: int, y: int, rows: int, columns: int, group: int, block_rows: int, scale_stride: int, bits: int, offset: int, pattern: int, y_type: int, scale_type: int, threads: int) -> None:
    """Codes into numbers; csrc/cast/decode.h."""

def decode_avx2(*, codes: int, values: int, scale: int, zero: int, factor: int, y: int, rows: int, columns: int, group: int, block_rows: int, scale_stride: int, bits: int, offset: int, pattern: int, y_type: int, scale_type: int, threads: int) -> None:
    """Codes into numbers; csrc/cast/decode.h."""

def decode_avx512(*, codes: int, values: int, scale: int, zero: int, factor: int, y: int, rows: int, columns: int, group: int, block_rows: int, scale_stride: int, bits: int, offset: int, pattern: int, y_type: int, scale_type: int, threads: int) -> None:
    """Codes into numbers; csrc/cast/decode.h."""

def fingerprint(bytes: int, count: int, threads: int) -> int:
    """64 bits of so many bytes; csrc/cast/fingerprint.h."""

def digits_to_bits(source: int, target: int, rows: int, columns: int, threads: int) -> None:
    """Rows of ternary codes; csrc/cast/digits.h."""

def bits_to_digits(source: int, target: int, rows: int, columns: int, threads: int) -> None:
    """Rows of ternary codes; csrc/cast/digits.h."""

class Scaling:
    """A norm's weight, bias and numbers; csrc/decode/layer.h."""

    def __init__(self, weight: int, bias: int, epsilon: float, offset: float, rounded: bool, centered: bool) -> None: ...

class DecoderLayer:
    """A decoder's layer for one token; csrc/decode/layer.h."""

    def __init__(self, *, isa: str, columns: int, heads: int, key_heads: int, head: int, turning: int, scale: float, softcap: float, type: int, parallel: bool, interleaved: bool, before: Scaling, between: Sequence[Scaling], after: Sequence[Scaling], of_heads: Sequence[Scaling], block: Block | None, mixture: Mixture | None) -> None: ...

    def multiply(self, place: int, chain: Chain) -> None:
        """Adds a product: 0 q, k, v, 1 out."""

def unchanged(owners: tuple[dict[str, object], ...], keys: tuple[str, ...], values: tuple[object, ...]) -> bool:
    """Whether owner.get(key) is value for all of them."""

def run_layers(layers: Sequence[DecoderLayer], x: int, cos: int, sin: int, y: int, keys: Sequence[int], values: Sequence[int], known: Sequence[int], key_stride: Sequence[int], value_stride: Sequence[int], threads: int) -> None:
    """
    One token through layers, each of the result before it, into y [layers, columns]; their keys and values have room for one behind the known ones.
    """

def embedding_generic(settled: CodedCall, indices: int, codes: int, scale: int, zero: int, factor: int, y: int, threads: int) -> int:
    """
    Expands rows of a stored matrix; returns the position of the first index outside it, or -1.
    """

class Block:
    """A feed-forward block; csrc/experts/experts.h."""

    def __init__(self, *, isa: str, gate_up: Sequence[Chain], down: Chain, gated: bool, activation: int, limit: float, slope: float, raised: float) -> None: ...

class Mixture:
    """Blocks and what chooses among them; csrc/experts/mixture.h."""

    def __init__(self, *, blocks: Sequence[Block], router: Chain, choices: int, normalized: bool, shared: Block | None, shared_gate: Chain | None) -> None: ...

def run_experts(blocks: Sequence[Block], numbers: Sequence[int], x: int, chosen: int, weights: int, y: int, rows: int, choices: int, threads: int) -> None:
    """
    x [rows, columns] to y: for each row the weighted sum of the results of its chosen blocks, by number.
    """

def run_mixture(mixture: Mixture, x: int, y: int, threads: int) -> None:
    """One row x [columns] to y."""

class CodedCall:
    """A product with stored codes, but for its tensors; csrc/linear/coded.h."""

    def __init__(self, *, values: int, table: int, rows: int, outputs: int, columns: int, group: int, block_rows: int, scale_stride: int, unit: float, zero_point: int, bits: int, packed: bool, int8: bool, element: int, x_type: int, scale_type: int, bias_type: int, activation: int, addend_type: int) -> None: ...

def int_generic(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def int_avx2(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def int_avx512(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def int_avx512_vbmi(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def int_amx(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def int_amx_emulated(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def float_generic(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def float_avx2(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def float_avx512(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def float_avx512_vbmi(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def float_amx(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def float_amx_emulated(settled: CodedCall, x: int, codes: int, scale: int, zero: int, factor: int, bias: int, addend: int, y: int, threads: int) -> None:
    """
    y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the instruction set.
    """

def int_both_avx512(settled: CodedCall, x: int, x_scale: int, codes: int, scale: int, factor: int, y: int, threads: int) -> None:
    """
    x @ (...).T of two matrices of the same codes of 4 bits, x_scale fp32 [rows, groups]. The machine must have the instruction set.
    """

def int_both_avx512_vbmi(settled: CodedCall, x: int, x_scale: int, codes: int, scale: int, factor: int, y: int, threads: int) -> None:
    """
    x @ (...).T of two matrices of the same codes of 4 bits, x_scale fp32 [rows, groups]. The machine must have the instruction set.
    """

def pack_codes(source: int, target: int, outputs: int, columns: int, bits: int, threads: int) -> None:
    """Codes by rows as panels; csrc/linear/coded.h."""

def unpack_codes(source: int, target: int, outputs: int, columns: int, bits: int, threads: int) -> None:
    """Panels as codes by rows."""

def linear_dense_generic(x: int, weight: int, bias: int, addend: int, y: int, rows: int, outputs: int, columns: int, x_type: int, weight_type: int, bias_type: int, y_type: int, activation: int, addend_type: int, threads: int) -> None:
    """
    y = activation(x @ weight.T + bias) + addend; addresses, 0 for an absent one. The machine must have the instruction set.
    """

def linear_dense_avx2(x: int, weight: int, bias: int, addend: int, y: int, rows: int, outputs: int, columns: int, x_type: int, weight_type: int, bias_type: int, y_type: int, activation: int, addend_type: int, threads: int) -> None:
    """
    y = activation(x @ weight.T + bias) + addend; addresses, 0 for an absent one. The machine must have the instruction set.
    """

def linear_dense_avx512(x: int, weight: int, bias: int, addend: int, y: int, rows: int, outputs: int, columns: int, x_type: int, weight_type: int, bias_type: int, y_type: int, activation: int, addend_type: int, threads: int) -> None:
    """
    y = activation(x @ weight.T + bias) + addend; addresses, 0 for an absent one. The machine must have the instruction set.
    """

def linear_dense_amx(x: int, weight: int, bias: int, addend: int, y: int, rows: int, outputs: int, columns: int, x_type: int, weight_type: int, bias_type: int, y_type: int, activation: int, addend_type: int, threads: int) -> None:
    """
    y = activation(x @ weight.T + bias) + addend; addresses, 0 for an absent one. The machine must have the instruction set.
    """

def linear_dense_amx_emulated(x: int, weight: int, bias: int, addend: int, y: int, rows: int, outputs: int, columns: int, x_type: int, weight_type: int, bias_type: int, y_type: int, activation: int, addend_type: int, threads: int) -> None:
    """
    y = activation(x @ weight.T + bias) + addend; addresses, 0 for an absent one. The machine must have the instruction set.
    """

class Chain:
    """Several products in one call; csrc/linear/chain.h."""

    def __init__(self, type: int) -> None: ...

    def coded(self, term: int, kernel: str, settled: CodedCall) -> None:
        """A factor stored as codes."""

    def dense(self, term: int, kernel: str, outputs: int, columns: int, weight_type: int, bias_type: int) -> None:
        """A dense factor."""

    def placed(self, tensors: Sequence[int], bias: int) -> Chain:
        """The same with the addresses of its tensors."""

def run_chain(settled: Chain, tensors: Sequence[int], bias: int, x: int, y: int, rows: int, threads: int) -> None:
    """x [rows, columns] to y [rows, outputs]."""

class Features:
    """What CPUID, XGETBV and arch_prctl say of this CPU; caches in bytes."""

    @property
    def avx2(self) -> bool: ...

    @property
    def avx512(self) -> bool: ...

    @property
    def avx512_vbmi(self) -> bool: ...

    @property
    def amx(self) -> bool: ...

    @property
    def avx_vnni(self) -> bool: ...

    @property
    def avx512_vnni(self) -> bool: ...

    @property
    def avx512_bf16(self) -> bool: ...

    @property
    def avx512_fp16(self) -> bool: ...

    @property
    def amx_int8(self) -> bool: ...

    @property
    def amx_bf16(self) -> bool: ...

    @property
    def model(self) -> str: ...

    @property
    def l1d(self) -> int: ...

    @property
    def l2(self) -> int: ...

    @property
    def l3(self) -> int: ...

def machine_features() -> Features:
    """The features of this machine, detected once."""

def machine_release_memory() -> None:
    """Gives memory that was freed back to the system."""

def machine_multiply_adds_per_second(isa: str, element: str, threads: int, seconds: float, repeats: int) -> float:
    """
    Multiply-adds per second on operands in L1: the median of `repeats` runs of `seconds` each.
    """

def machine_read_bytes_per_second(isa: str, bytes: int, threads: int, repeats: int) -> float:
    """
    Bytes read per second from a buffer of `bytes`, rounded up to whole pages: the median of `repeats` passes.
    """

def machine_read_once(isa: str, address: int, bytes: int, threads: int) -> None:
    """
    Reads memory that is there, its whole pages, once: for benchmarks to time beside what does more.
    """

def machine_copy_bytes_per_second(bytes: int, threads: int, repeats: int) -> float:
    """
    Bytes copied per second (each read and written) between buffers of `bytes`: the median of `repeats` passes.
    """

def adamw_generic(whole: Sequence[int], factors: Sequence[float], grad_factor: float, decay: float, first_weight: float, second_decay: float, second_weight: float, epsilon: float, seed: int, stochastic: bool, threads: int) -> None:
    """
    AdamW's step of several parameters, 12 whole numbers and 2 factors of each; csrc/optimizer/adamw.h.
    """

def adamw_avx2(whole: Sequence[int], factors: Sequence[float], grad_factor: float, decay: float, first_weight: float, second_decay: float, second_weight: float, epsilon: float, seed: int, stochastic: bool, threads: int) -> None:
    """
    AdamW's step of several parameters, 12 whole numbers and 2 factors of each; csrc/optimizer/adamw.h.
    """

def adamw_avx512(whole: Sequence[int], factors: Sequence[float], grad_factor: float, decay: float, first_weight: float, second_decay: float, second_weight: float, epsilon: float, seed: int, stochastic: bool, threads: int) -> None:
    """
    AdamW's step of several parameters, 12 whole numbers and 2 factors of each; csrc/optimizer/adamw.h.
    """

def rms_norm_generic(x: int, weight: int, y: int, rows: int, columns: int, epsilon: float, offset: float, rounded: bool, type: int, weight_type: int, y_type: int, threads: int) -> None:
    """
    y = x / sqrt(mean(x * x) + epsilon) * (weight + offset), by rows; csrc/rowwise/rowwise.h.
    """

def rms_norm_avx2(x: int, weight: int, y: int, rows: int, columns: int, epsilon: float, offset: float, rounded: bool, type: int, weight_type: int, y_type: int, threads: int) -> None:
    """
    y = x / sqrt(mean(x * x) + epsilon) * (weight + offset), by rows; csrc/rowwise/rowwise.h.
    """

def rms_norm_avx512(x: int, weight: int, y: int, rows: int, columns: int, epsilon: float, offset: float, rounded: bool, type: int, weight_type: int, y_type: int, threads: int) -> None:
    """
    y = x / sqrt(mean(x * x) + epsilon) * (weight + offset), by rows; csrc/rowwise/rowwise.h.
    """

def layer_norm_generic(x: int, weight: int, bias: int, y: int, rows: int, columns: int, epsilon: float, type: int, weight_type: int, y_type: int, threads: int) -> None:
    """
    y = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias, by rows; csrc/rowwise/rowwise.h.
    """

def layer_norm_avx2(x: int, weight: int, bias: int, y: int, rows: int, columns: int, epsilon: float, type: int, weight_type: int, y_type: int, threads: int) -> None:
    """
    y = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias, by rows; csrc/rowwise/rowwise.h.
    """

def layer_norm_avx512(x: int, weight: int, bias: int, y: int, rows: int, columns: int, epsilon: float, type: int, weight_type: int, y_type: int, threads: int) -> None:
    """
    y = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias, by rows; csrc/rowwise/rowwise.h.
    """

def gated_generic(gate: int, up: int, y: int, rows: int, count: int, stride: int, activation: int, type: int, threads: int) -> None:
    """y = activation(gate) * up, of rows that are `stride` numbers apart."""

def gated_avx2(gate: int, up: int, y: int, rows: int, count: int, stride: int, activation: int, type: int, threads: int) -> None:
    """y = activation(gate) * up, of rows that are `stride` numbers apart."""

def gated_avx512(gate: int, up: int, y: int, rows: int, count: int, stride: int, activation: int, type: int, threads: int) -> None:
    """y = activation(gate) * up, of rows that are `stride` numbers apart."""

def norm_grad_generic(grad: int, x: int, weight: int, grad_x: int, grad_weight: int, grad_bias: int, rows: int, columns: int, epsilon: float, offset: float, centered: bool, type: int, weight_type: int, y_type: int, threads: int) -> None:
    """
    The gradients of a norm, those of weight and bias in fp32 and at 0 left out; csrc/rowwise/rowwise.h.
    """

def norm_grad_avx2(grad: int, x: int, weight: int, grad_x: int, grad_weight: int, grad_bias: int, rows: int, columns: int, epsilon: float, offset: float, centered: bool, type: int, weight_type: int, y_type: int, threads: int) -> None:
    """
    The gradients of a norm, those of weight and bias in fp32 and at 0 left out; csrc/rowwise/rowwise.h.
    """

def norm_grad_avx512(grad: int, x: int, weight: int, grad_x: int, grad_weight: int, grad_bias: int, rows: int, columns: int, epsilon: float, offset: float, centered: bool, type: int, weight_type: int, y_type: int, threads: int) -> None:
    """
    The gradients of a norm, those of weight and bias in fp32 and at 0 left out; csrc/rowwise/rowwise.h.
    """

def gated_grad_generic(grad: int, gate: int, up: int, grad_gate: int, grad_up: int, count: int, activation: int, type: int, threads: int) -> None:
    """The gradients of activation(gate) * up."""

def gated_grad_avx2(grad: int, gate: int, up: int, grad_gate: int, grad_up: int, count: int, activation: int, type: int, threads: int) -> None:
    """The gradients of activation(gate) * up."""

def gated_grad_avx512(grad: int, gate: int, up: int, grad_gate: int, grad_up: int, count: int, activation: int, type: int, threads: int) -> None:
    """The gradients of activation(gate) * up."""

def cross_entropy_generic(logits: int, labels: int, factors: int, losses: int, rows: int, columns: int, softcap: float, smoothing: float, gradient: bool, type: int, rounded: int, threads: int) -> None:
    """
    Each row's cross entropy with its label; the logits become its derivative; csrc/rowwise/rowwise.h.
    """

def cross_entropy_avx2(logits: int, labels: int, factors: int, losses: int, rows: int, columns: int, softcap: float, smoothing: float, gradient: bool, type: int, rounded: int, threads: int) -> None:
    """
    Each row's cross entropy with its label; the logits become its derivative; csrc/rowwise/rowwise.h.
    """

def cross_entropy_avx512(logits: int, labels: int, factors: int, losses: int, rows: int, columns: int, softcap: float, smoothing: float, gradient: bool, type: int, rounded: int, threads: int) -> None:
    """
    Each row's cross entropy with its label; the logits become its derivative; csrc/rowwise/rowwise.h.
    """

def dropout_generic(x: int, y: int, rows: int, columns: int, seed: int, p: float, type: int, threads: int) -> None:
    """y = x, of which the share p is dropped; csrc/rowwise/rowwise.h."""

def dropout_avx2(x: int, y: int, rows: int, columns: int, seed: int, p: float, type: int, threads: int) -> None:
    """y = x, of which the share p is dropped; csrc/rowwise/rowwise.h."""

def dropout_avx512(x: int, y: int, rows: int, columns: int, seed: int, p: float, type: int, threads: int) -> None:
    """y = x, of which the share p is dropped; csrc/rowwise/rowwise.h."""

def rotate_generic(q: int, q_stride: Sequence[int], q_heads: int, turned_q: int, k: int, k_stride: Sequence[int], k_heads: int, turned_k: int, cos: int, sin: int, same_angles: bool, batch: int, tokens: int, columns: int, rest: int, type: int, angle_type: int, threads: int) -> None:
    """
    Queries and keys [batch, heads, tokens, columns + rest], of any strides but the last, turned; the results lie as [batch, tokens, heads, ...].
    """

def rotate_avx2(q: int, q_stride: Sequence[int], q_heads: int, turned_q: int, k: int, k_stride: Sequence[int], k_heads: int, turned_k: int, cos: int, sin: int, same_angles: bool, batch: int, tokens: int, columns: int, rest: int, type: int, angle_type: int, threads: int) -> None:
    """
    Queries and keys [batch, heads, tokens, columns + rest], of any strides but the last, turned; the results lie as [batch, tokens, heads, ...].
    """

def rotate_avx512(q: int, q_stride: Sequence[int], q_heads: int, turned_q: int, k: int, k_stride: Sequence[int], k_heads: int, turned_k: int, cos: int, sin: int, same_angles: bool, batch: int, tokens: int, columns: int, rest: int, type: int, angle_type: int, threads: int) -> None:
    """
    Queries and keys [batch, heads, tokens, columns + rest], of any strides but the last, turned; the results lie as [batch, tokens, heads, ...].
    """

def attend_generic(q: int, q_stride: Sequence[int], keys: int, key_stride: Sequence[int], values: int, value_stride: Sequence[int], y: int, batch: int, heads: int, key_heads: int, count: int, columns: int, scale: float, softcap: float, type: int, threads: int, sinks: int) -> None:
    """
    One query for every head against keys [batch, key_heads, count, columns]; csrc/rowwise/rowwise.h.
    """

def attend_avx2(q: int, q_stride: Sequence[int], keys: int, key_stride: Sequence[int], values: int, value_stride: Sequence[int], y: int, batch: int, heads: int, key_heads: int, count: int, columns: int, scale: float, softcap: float, type: int, threads: int, sinks: int) -> None:
    """
    One query for every head against keys [batch, key_heads, count, columns]; csrc/rowwise/rowwise.h.
    """

def attend_avx512(q: int, q_stride: Sequence[int], keys: int, key_stride: Sequence[int], values: int, value_stride: Sequence[int], y: int, batch: int, heads: int, key_heads: int, count: int, columns: int, scale: float, softcap: float, type: int, threads: int, sinks: int) -> None:
    """
    One query for every head against keys [batch, key_heads, count, columns]; csrc/rowwise/rowwise.h.
    """

class SparseCodes:
    def __init__(self, values: int, group: int, block_rows: int, scale_stride: int, bits: int, offset: int, pattern: int, scale_type: int) -> None: ...

def sparse_masked_generic(codes: SparseCodes | None, x: int, values: int, scale: int, zero: int, factor: int, where: int, bias: int, y: int, rows: int, outputs: int, columns: int, kept: int, block: int, index_bytes: int, x_type: int, value_type: int, bias_type: int, threads: int) -> int:
    """
    y = x @ W.T + bias with W of `kept` numbers in each row, where a mask (block 0) or blocks say; addresses, 0 for an absent one. Returns the index of the first block outside the matrix or out of order, or -1. The machine must have the instruction set.
    """

def sparse_masked_avx2(codes: SparseCodes | None, x: int, values: int, scale: int, zero: int, factor: int, where: int, bias: int, y: int, rows: int, outputs: int, columns: int, kept: int, block: int, index_bytes: int, x_type: int, value_type: int, bias_type: int, threads: int) -> int:
    """
    y = x @ W.T + bias with W of `kept` numbers in each row, where a mask (block 0) or blocks say; addresses, 0 for an absent one. Returns the index of the first block outside the matrix or out of order, or -1. The machine must have the instruction set.
    """

def sparse_masked_avx512(codes: SparseCodes | None, x: int, values: int, scale: int, zero: int, factor: int, where: int, bias: int, y: int, rows: int, outputs: int, columns: int, kept: int, block: int, index_bytes: int, x_type: int, value_type: int, bias_type: int, threads: int) -> int:
    """
    y = x @ W.T + bias with W of `kept` numbers in each row, where a mask (block 0) or blocks say; addresses, 0 for an absent one. Returns the index of the first block outside the matrix or out of order, or -1. The machine must have the instruction set.
    """

def sparse_masked_avx512_vbmi(codes: SparseCodes | None, x: int, values: int, scale: int, zero: int, factor: int, where: int, bias: int, y: int, rows: int, outputs: int, columns: int, kept: int, block: int, index_bytes: int, x_type: int, value_type: int, bias_type: int, threads: int) -> int:
    """
    y = x @ W.T + bias with W of `kept` numbers in each row, where a mask (block 0) or blocks say; addresses, 0 for an absent one. Returns the index of the first block outside the matrix or out of order, or -1. The machine must have the instruction set.
    """

def sparse_blocks_generic(codes: SparseCodes | None, x: int, values: int, scale: int, zero: int, factor: int, where: int, bias: int, y: int, rows: int, outputs: int, columns: int, kept: int, block: int, index_bytes: int, x_type: int, value_type: int, bias_type: int, threads: int) -> int:
    """
    y = x @ W.T + bias with W of `kept` numbers in each row, where a mask (block 0) or blocks say; addresses, 0 for an absent one. Returns the index of the first block outside the matrix or out of order, or -1. The machine must have the instruction set.
    """

def sparse_blocks_avx2(codes: SparseCodes | None, x: int, values: int, scale: int, zero: int, factor: int, where: int, bias: int, y: int, rows: int, outputs: int, columns: int, kept: int, block: int, index_bytes: int, x_type: int, value_type: int, bias_type: int, threads: int) -> int:
    """
    y = x @ W.T + bias with W of `kept` numbers in each row, where a mask (block 0) or blocks say; addresses, 0 for an absent one. Returns the index of the first block outside the matrix or out of order, or -1. The machine must have the instruction set.
    """

def sparse_blocks_avx512(codes: SparseCodes | None, x: int, values: int, scale: int, zero: int, factor: int, where: int, bias: int, y: int, rows: int, outputs: int, columns: int, kept: int, block: int, index_bytes: int, x_type: int, value_type: int, bias_type: int, threads: int) -> int:
    """
    y = x @ W.T + bias with W of `kept` numbers in each row, where a mask (block 0) or blocks say; addresses, 0 for an absent one. Returns the index of the first block outside the matrix or out of order, or -1. The machine must have the instruction set.
    """
