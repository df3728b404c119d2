"""The order in which the processes of xdist take files."""

LONGEST = (
    *(
        "kernels/test_triton_compile.py",
        "kernels/test_ptx_kernels.py",
        "test_faults.py",
        "test_commands_shown.py",
    ),
    *("kernels/test_cuda_compile.py", "hooks/test_pipeline_matrix.py", "kernels/test_ptx_mutants.py"),
    *("test_packaging.py", "evaluation/test_evaluate.py", "canvas/test_canvas_weights.py"),
    *("hooks/test_pipelines_nested.py", "canvas/test_canvas_kinds.py", "ops/test_erase_step.py"),
    *("attack/test_attack_command.py", "test_eraser.py", "kernels/test_cuda_emulated.py"),
    "kernels/test_ptx_cuda.py",
    *("kernels/test_detect_prefix.py", "hooks/test_row_layouts.py", "test_doors.py"),
)
"""Files of 15 s and more, which the processes begin before all others, longest first: one that is left for the end
would keep one core busy and the others idle. What an earlier one has had compiled a later one finds
(`tests.kernels.triton_process.cache`).
"""
