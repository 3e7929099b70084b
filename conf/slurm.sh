#!/bin/bash
#SBATCH --job-name=crysldnet
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=@GPUS@
#SBATCH --gpus-per-node=@GPUS@
#SBATCH --cpus-per-task=@CPUS@
#SBATCH --time=@TIME@
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --output="@LOGS@/%j.log"@SBATCH@
# SLURM makes no folder for the log. --signal without B: goes to the processes that srun starts.

cd '@ROOT@' || exit

name=slurm-$SLURM_JOB_ID
folder=@RUNS@/@COMMAND@/$name
[ -e "$folder/summary.json" ] && { echo "$folder is complete"; exit 0; }
resume=null
[ -e "$folder/config.yaml" ] && resume=last

echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, resume=$resume, on ${SLURM_JOB_NODELIST:-this machine}"
srun --kill-on-bad-exit=1 --cpus-per-task=@CPUS@ env @RUN@ crysldnet @COMMAND@ runs=@RUNS@ "name=$name" "resume=$resume" trainer.progress_bar=false @ARGS@
status=$?
echo "$(date '+%F %T') job $SLURM_JOB_ID, status $status"
if [ "$status" -eq 75 ]; then # stopped before its end, can be resumed
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$status"
