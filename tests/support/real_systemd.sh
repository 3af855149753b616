# Boots systemd as process 1 of namespaces of its own, with fusemig@disks.service and the guest that is to be run beside
# it; ends with the guest. Arguments: a directory with units/ and guest.sh, which it leaves its exit code in.
#
#   unshare --pid --fork --kill-child --mount --mount-proc --ipc --uts sh real_systemd.sh DIRECTORY
set -e
directory=$1
mount --make-rprivate /
umount -l /sys/fs/cgroup || true
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs none /run
mount -t tmpfs none /etc/systemd/system
cp "$directory"/units/* /etc/systemd/system/
cat > /etc/systemd/system/guest.service <<UNIT
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'sh $directory/guest.sh > $directory/guest.log 2>&1; echo \$? > $directory/code'
ExecStartPost=/bin/systemctl exit --force --force
UNIT
cat > /etc/systemd/system/guest.target <<UNIT
[Unit]
DefaultDependencies=no
Wants=guest.service
UNIT
exec env container=test /lib/systemd/systemd --unit=guest.target --log-target=console --log-level=info
