def embedding_int_generic(indices: int, codes: int, scale: int, zero: int, y: int, rows: int, table_rows: int, columns: int, group: int, scale_stride: int, bits: int, scale_type: int, y_type: int, threads: int) -> int:
    """
    Expands rows of a table; returns the position of the first index outside it, or -1.
    """

def linear_int_generic(x: int, codes: int, scale: int, zero: int, bias: int, y: int, rows: int, outputs: int, columns: int, group: int, scale_stride: int, bits: int, x_type: int, scale_type: int, bias_type: int, threads: int) -> None:
    """
    y = x @ ((u - z) * scale).T + bias; addresses, 0 for an absent zero or bias. The machine must have the instruction set.
    """

def linear_int_avx2(x: int, codes: int, scale: int, zero: int, bias: int, y: int, rows: int, outputs: int, columns: int, group: int, scale_stride: int, bits: int, x_type: int, scale_type: int, bias_type: int, threads: int) -> None:
    """
    y = x @ ((u - z) * scale).T + bias; addresses, 0 for an absent zero or bias. The machine must have the instruction set.
    """

def linear_int_avx512(x: int, codes: int, scale: int, zero: int, bias: int, y: int, rows: int, outputs: int, columns: int, group: int, scale_stride: int, bits: int, x_type: int, scale_type: int, bias_type: int, threads: int) -> None:
    """
    y = x @ ((u - z) * scale).T + bias; addresses, 0 for an absent zero or bias. The machine must have the instruction set.
    """

def linear_int_amx(x: int, codes: int, scale: int, zero: int, bias: int, y: int, rows: int, outputs: int, columns: int, group: int, scale_stride: int, bits: int, x_type: int, scale_type: int, bias_type: int, threads: int) -> None:
    """
    y = x @ ((u - z) * scale).T + bias; addresses, 0 for an absent zero or bias. The machine must have the instruction set.
    """

def linear_int_amx_emulated(x: int, codes: int, scale: int, zero: int, bias: int, y: int, rows: int, outputs: int, columns: int, group: int, scale_stride: int, bits: int, x_type: int, scale_type: int, bias_type: int, threads: int) -> None:
    """
    y = x @ ((u - z) * scale).T + bias; addresses, 0 for an absent zero or bias. The machine must have the instruction set.
    """

def linear_dense_generic(x: int, weight: int, bias: int, y: int, rows: int, outputs: int, columns: int, x_type: int, weight_type: int, bias_type: int, threads: int) -> None:
    """
    y = x @ weight.T + bias; addresses, 0 for an absent bias. The machine must have the instruction set.
    """

def linear_dense_avx2(x: int, weight: int, bias: int, y: int, rows: int, outputs: int, columns: int, x_type: int, weight_type: int, bias_type: int, threads: int) -> None:
    """
    y = x @ weight.T + bias; addresses, 0 for an absent bias. The machine must have the instruction set.
    """

def linear_dense_avx512(x: int, weight: int, bias: int, y: int, rows: int, outputs: int, columns: int, x_type: int, weight_type: int, bias_type: int, threads: int) -> None:
    """
    y = x @ weight.T + bias; addresses, 0 for an absent bias. The machine must have the instruction set.
    """

class Features:
    """What CPUID, XGETBV and arch_prctl say of this CPU; caches in bytes."""

    @property
    def avx2(self) -> bool: ...

    @property
    def avx512(self) -> bool: ...

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

def machine_multiply_adds_per_second(isa: str, element: str, threads: int, seconds: float, repeats: int) -> float:
    """
    Multiply-adds per second on operands in L1: the median of `repeats` runs of `seconds` each.
    """

def machine_read_bytes_per_second(isa: str, bytes: int, threads: int, repeats: int) -> float:
    """
    Bytes read per second from a buffer of `bytes`, rounded up to whole pages: the median of `repeats` passes.
    """

def machine_copy_bytes_per_second(bytes: int, threads: int, repeats: int) -> float:
    """
    Bytes copied per second (each read and written) between buffers of `bytes`: the median of `repeats` passes.
    """
