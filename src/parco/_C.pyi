def embedding_int_generic(indices: int, codes: int, scale: int, zero: int, y: int, rows: int, table_rows: int, columns: int, group: int, scale_stride: int, bits: int, scale_type: int, y_type: int, threads: int) -> int:
    """
    Expands rows of a table; returns the position of the first index outside it, or -1.
    """

def linear_int_generic(arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, arg5: int, arg6: int, arg7: int, arg8: int, arg9: int, arg10: int, arg11: int, arg12: int, arg13: int, arg14: int, arg15: int, /) -> None: ...

def linear_int_avx2(arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, arg5: int, arg6: int, arg7: int, arg8: int, arg9: int, arg10: int, arg11: int, arg12: int, arg13: int, arg14: int, arg15: int, /) -> None: ...

def linear_int_avx512(arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, arg5: int, arg6: int, arg7: int, arg8: int, arg9: int, arg10: int, arg11: int, arg12: int, arg13: int, arg14: int, arg15: int, /) -> None: ...

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
