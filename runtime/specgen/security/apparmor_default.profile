# What RuntimeDefault means on a node with AppArmor: apparmor.d(5). Loaded by the agent at each start.
#
# Capabilities, seccomp and namespaces do most of the work. This profile is what still holds where they were loosened:
# a container with CAP_SYS_ADMIN, or with unmasked paths, cannot mount, nor change the node through /proc or /sys.
$abi

profile $name flags=(attach_disconnected,mediate_deleted) {
  file,
  network,
  unix,
  capability,
  umount,

  # Signals come from the agent, the monitor and the OCI runtime, and go round among containers only.
  signal (send, receive) peer=$name,
  signal (receive) peer=unconfined,
  signal (receive) peer=crun,
  signal (receive) peer=runc,
$agent
  # Debuggers work inside a container; PID namespaces keep them in their own.
  ptrace (trace, read, tracedby, readby) peer=$name,

  # A bind mount would give a denied path another name.
  deny mount,
  deny remount,
  deny pivot_root,

  # In /proc only what belongs to processes may be written, and the sysctls of System V shared memory.
  deny /proc/* w,
  deny /proc/[^1-9st]*/** w,
  deny /proc/s[^ey]*/** w,
  deny /proc/sy[^s]*/** w,
  deny /proc/sys?*/** w,
  deny /proc/t[^h]*/** w,
  deny /proc/sys/[^k]*/** w,
  deny /proc/sys/k[^e]*/** w,
  deny /proc/sys/kernel/{[^s]*,s[^h]*}{,/**} w,
  deny /proc/kcore rwklx,
  deny /proc/sysrq-trigger rwklx,

  # In /sys only the container's own cgroup.
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/firmware/** rwklx,
  deny /sys/kernel/security/** rwklx,
}
