"""Recorded cgroup trees: the files of one container's cgroup as the kernel writes them, in both versions."""

from __future__ import annotations

from pathlib import Path

from host.cgroups import Hierarchies

V1 = {
    "cpuacct": {"cpuacct.usage": "12345678901\n", "cpuacct.stat": "user 1000\nsystem 234\n"},
    "cpu": {
        "cpu.stat": "nr_periods 50\nnr_throttled 7\nthrottled_time 350000000\nnr_bursts 2\nburst_time 9000\n",
        "cpu.shares": "512\n",
        "cpu.cfs_period_us": "100000\n",
        "cpu.cfs_quota_us": "50000\n",
    },
    "memory": {
        "memory.usage_in_bytes": "104857600\n",
        "memory.max_usage_in_bytes": "209715200\n",
        "memory.failcnt": "3\n",
        "memory.limit_in_bytes": "268435456\n",
        "memory.soft_limit_in_bytes": "9223372036854771712\n",
        "memory.memsw.limit_in_bytes": "536870912\n",
        "memory.kmem.usage_in_bytes": "4096000\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        "memory.stat": (
            "cache 1\nrss 2\npgfault 3\ninactive_file 4\nactive_file 5\nhierarchical_memory_limit 268435456\n"
            "total_cache 60000000\ntotal_rss 40000000\ntotal_mapped_file 5000000\ntotal_swap 1000000\n"
            "total_workingset_refault_anon 11\ntotal_workingset_refault_file 22\ntotal_pgfault 3333\n"
            "total_pgmajfault 44\ntotal_inactive_file 30000000\ntotal_active_file 20000000\n"
        ),
    },
    "blkio": {
        "blkio.throttle.io_service_bytes_recursive": (
            "254:0 Read 4096\n254:0 Write 8192\n254:0 Sync 12288\n254:0 Async 0\n254:0 Discard 0\n254:0 Total 12288\n"
            "Total 12288\n"
        ),
        "blkio.throttle.io_serviced_recursive": "254:0 Read 1\n254:0 Write 2\n254:0 Total 3\nTotal 3\n",
    },
    "pids": {"pids.current": "5\n", "pids.max": "100\n", "cgroup.procs": "10\n11\n"},
    "hugetlb": {
        "hugetlb.2MB.usage_in_bytes": "2097152\n",
        "hugetlb.2MB.max_usage_in_bytes": "4194304\n",
        "hugetlb.2MB.failcnt": "1\n",
    },
}

PRESSURE = "some avg10=0.00 avg60=0.00 avg300=0.00 total={}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total={}\n"
V2 = {
    "cpu.stat": (
        "usage_usec 12345678\nuser_usec 10000000\nsystem_usec 2345678\nnice_usec 0\ncore_sched.force_idle_usec 0\n"
        "nr_periods 50\nnr_throttled 7\nthrottled_usec 350000\nnr_bursts 2\nburst_usec 9\n"
    ),
    "cpu.weight": "20\n",
    "cpu.max": "50000 100000\n",
    "cpu.pressure": (
        "some avg10=1.50 avg60=0.75 avg300=0.10 total=123456\nfull avg10=0.50 avg60=0.25 avg300=0.05 total=23456\n"
    ),
    "memory.pressure": PRESSURE.format(7, 5),
    "io.pressure": PRESSURE.format(9, 8),
    "memory.current": "104857600\n",
    "memory.peak": "209715200\n",
    "memory.max": "268435456\n",
    "memory.low": "0\n",
    "memory.swap.current": "1000000\n",
    "memory.swap.max": "268435456\n",
    "memory.events": "low 0\nhigh 6\nmax 3\noom 2\noom_kill 2\noom_group_kill 0\n",
    "memory.stat": (
        "anon 40000000\nfile 60000000\nkernel 4096000\nkernel_stack 98304\npagetables 135168\nsec_pagetables 0\n"
        "percpu 0\nsock 0\nvmalloc 0\nshmem 0\nfile_mapped 5000000\nfile_dirty 0\nfile_writeback 0\nswapcached 0\n"
        "inactive_anon 1\nactive_anon 2\ninactive_file 30000000\nactive_file 20000000\nunevictable 0\nslab 100\n"
        "workingset_refault_anon 11\nworkingset_refault_file 22\nworkingset_activate_anon 0\npgfault 3333\n"
        "pgmajfault 44\npgrefill 0\n"
    ),
    "io.stat": "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n7:0 \n",
    "pids.current": "5\n",
    "pids.max": "max\n",
    "cgroup.procs": "10\n11\n",
    "hugetlb.2MB.current": "2097152\n",
    "hugetlb.2MB.events": "max 1\n",
}


def make_v1(folder: Path, path: str) -> Hierarchies:
    """The v1 tree below ``folder``, one hierarchy per controller."""
    for controller, files in V1.items():
        _write(folder / controller / path.lstrip("/"), files)
    return Hierarchies({controller: str(folder / controller) for controller in V1}, None)


def make_v2(folder: Path, path: str) -> Hierarchies:
    """The v2 tree below ``folder``."""
    _write(folder / path.lstrip("/"), V2)
    return Hierarchies({}, str(folder))


def make_hybrid(folder: Path, path: str) -> Hierarchies:
    """v1 controllers, and beside them a cgroup2 that has only what exists without controllers."""
    names = ("cpu.pressure", "memory.pressure", "io.pressure", "cgroup.procs")
    _write(folder / "unified" / path.lstrip("/"), {name: V2[name] for name in names})
    return Hierarchies(make_v1(folder, path).v1, str(folder / "unified"))


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
