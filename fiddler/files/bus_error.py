"""A handler of SIGBUS in machine code: one line on stderr and exit code 1 where a mapped file was cut short.

Python's own handlers run between bytecodes, which a thread that faults never reaches. This one runs in whichever thread
faults, needs neither the GIL nor memory, and calls only functions that POSIX permits in a handler. Knows addresses, not
what lies there; needs LLVM, not the kernels, so that `fiddler convert` starts without Numba.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any

from llvmlite import binding as llvm, ir

__all__ = ["exit_on_bus_error"]

_SA_SIGINFO = 4
_CODE, _ADDRESS = 8, 16  # offsets of si_code and si_addr in Linux's siginfo_t, 64 bits
_STDERR = 2
_I32, _I64 = ir.IntType(32), ir.IntType(64)


class _Action(ctypes.Structure):
    """`struct sigaction` of glibc and musl on Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_installed: list[Any] = []  # what the handler reads, and its code: never freed


def exit_on_bus_error(table: int, rows: int) -> None:
    """End the process with one line and exit code 1 where a mapping of a table cannot be read; once in a process.

    table: address of uint64 [rows, 4]: begin and end of a mapping (begin 0: none), address and length of a line. Any
    other SIGBUS goes to the handler before, as if this one were not there. For programs that own their process, as the
    command line does: a library's user decides himself. Linux with 64 bits only; elsewhere it does nothing.
    """
    if _installed or sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    before, entered = _Action(), ctypes.c_int32(0)
    module = _module(libc, table, rows, ctypes.addressof(before), ctypes.addressof(entered))
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    action = _Action(handler=engine.get_function_address("on_bus_error"), flags=_SA_SIGINFO)
    _installed.extend([before, entered, engine])
    libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(before))


def _module(libc: ctypes.CDLL, table: int, rows: int, before: int, entered: int) -> ir.Module:
    """The handler's code: void on_bus_error(int signal, siginfo_t *info, void *context)."""
    module = ir.Module("bus_error")
    handler = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I32, _I64, _I64]), "on_bus_error")
    number, info, _ = handler.args
    entry, scan, compare, report, alone, wait, following, foreign = (
        handler.append_basic_block(name)
        for name in ("entry", "scan", "compare", "report", "alone", "wait", "following", "foreign")
    )
    b = ir.IRBuilder(entry)

    def call(name: str, returns: ir.Type, *arguments: ir.Value) -> None:
        kind = ir.FunctionType(returns, [argument.type for argument in arguments])
        address = ctypes.cast(getattr(libc, name), ctypes.c_void_p).value
        b.call(b.inttoptr(ir.Constant(_I64, address), kind.as_pointer()), arguments)

    def load(address: ir.Value, kind: ir.Type = _I64) -> ir.Value:
        return b.load(b.inttoptr(address, kind.as_pointer()))

    address = load(b.add(info, ir.Constant(_I64, _ADDRESS)))
    code = load(b.add(info, ir.Constant(_I64, _CODE)), _I32)
    b.cbranch(b.icmp_signed(">", code, ir.Constant(_I32, 0)), scan, foreign)  # not sent by kill(2)
    b.position_at_end(scan)
    row = b.phi(_I64)
    row.add_incoming(ir.Constant(_I64, table), entry)
    b.cbranch(b.icmp_unsigned("<", row, ir.Constant(_I64, table + 32 * rows)), compare, foreign)
    b.position_at_end(compare)
    begin, end, line, length = (load(b.add(row, ir.Constant(_I64, 8 * field))) for field in range(4))
    listed = b.icmp_unsigned("!=", begin, ir.Constant(_I64, 0))
    inside = b.and_(b.icmp_unsigned(">=", address, begin), b.icmp_unsigned("<", address, end))
    b.cbranch(b.and_(listed, inside), report, following)
    b.position_at_end(following)
    row.add_incoming(b.add(row, ir.Constant(_I64, 32)), following)
    b.branch(scan)
    b.position_at_end(report)  # one thread alone, where several fault at once
    flag = b.inttoptr(ir.Constant(_I64, entered), _I32.as_pointer())
    first = b.atomic_rmw("xchg", flag, ir.Constant(_I32, 1), "seq_cst")
    b.cbranch(b.icmp_signed("==", first, ir.Constant(_I32, 0)), alone, wait)
    b.position_at_end(alone)
    call("write", _I64, ir.Constant(_I32, _STDERR), line, length)
    call("_exit", ir.VoidType(), ir.Constant(_I32, 1))
    b.unreachable()
    b.position_at_end(wait)
    call("pause", _I32)
    b.branch(wait)
    b.position_at_end(foreign)  # delivered again, to the handler before, when this one returns
    call("sigaction", _I32, number, ir.Constant(_I64, before), ir.Constant(_I64, 0))
    call("raise", _I32, number)
    b.ret_void()
    return module
