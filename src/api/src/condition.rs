//! Condition types, and for each the reasons that it can have.

use super::closed_enum::closed_enum;

closed_enum! {
    /// Types of the conditions in `status.conditions`.
    ConditionType {
        /// The spec has passed the checks that need no cluster.
        Validated,
        /// The batch Job exists.
        JobCreated,
        /// Kueue has reserved quota, or no queue is asked for.
        Admitted,
        /// A pod has a node.
        PodsScheduled,
        /// The trainer trains.
        Running,
        /// The user has suspended the job.
        Suspended,
        /// A checkpoint is in the bucket.
        Checkpointed,
        /// The LoRA is in the bucket. Final.
        Complete,
        /// The job ended without a LoRA, or cannot be carried out. Final unless `Validated` is False; its reasons are those of the trainer and of the
        /// operator's limits.
        Failed,
        /// The operator has not yet acted on the newest spec (kstatus).
        Reconciling,
        /// The job cannot go on without a change (kstatus).
        Stalled,
    }
}

closed_enum! {
    /// Reasons of `Validated`.
    ValidatedReason {
        /// True: the spec can be carried out.
        SpecAccepted,
        /// True, as a warning: another job that has not ended writes into the same output folder, or one of the two is inside the other.
        OutputShared,
        /// False: the spec contradicts itself, or Kubernetes refuses the pod that it describes; the message names the field.
        InvalidSpec,
        /// False: no division of the work fits the memory of the GPU asked for.
        GPUTooSmall,
        /// False: this version of the operator cannot read the object; a newer one has let it in. It does nothing about it.
        Unreadable,
    }
}

closed_enum! {
    /// Reasons of `JobCreated`.
    JobCreatedReason {
        /// True: the batch Job exists.
        Created,
        /// False: a Job of that name belongs to someone else; delete or rename one of the two.
        NameConflict,
        /// False: the namespace's ResourceQuota refuses it.
        QuotaExceeded,
        /// False: the operator may not create Jobs in this namespace.
        Forbidden,
        /// False: an admission webhook or a ValidatingAdmissionPolicy refuses the Job.
        AdmissionDenied,
        /// False: the API server failed; tried again with growing pauses.
        ApiError,
    }
}

closed_enum! {
    /// Reasons of `Admitted`.
    AdmittedReason {
        /// True: no queue is asked for.
        NoQueue,
        /// True: Kueue has reserved quota.
        QuotaReserved,
        /// False: waits for others to finish.
        WaitingForQuota,
        /// False: quota is reserved, and an admission check of the queue (such as the provisioning of nodes) is not through; the message names it.
        AdmissionCheckPending,
        /// False: no flavor of the queue fits the pod's node affinity.
        NoMatchingFlavor,
        /// False: asks for more than the queue can ever give.
        ExceedsMaxQuota,
        /// False: Kueue has taken the quota back; the job continues from its checkpoint later.
        Evicted,
        /// False: a job of higher priority has taken the quota; the job continues from its checkpoint later.
        Preempted,
        /// False: Kueue has given the Workload up (`spec.active: false`); nothing starts until somebody activates it again.
        WorkloadDeactivated,
        /// False: Kueue has made no Workload for the Job; a WorkloadPriorityClass that does not exist is the usual cause.
        NoWorkload,
        /// False: Kueue holds Jobs without a queue here; set `queueName`.
        NoQueueName,
        /// False: somebody has suspended the batch Job itself.
        JobSuspended,
        /// False: the namespace has no LocalQueue of that name.
        LocalQueueNotFound,
        /// False: `queueName` is set and the cluster has no Kueue.
        KueueNotInstalled,
    }
}

closed_enum! {
    /// Reasons of `PodsScheduled`.
    PodsScheduledReason {
        /// True: the pod has a node.
        Scheduled,
        /// False: no node fits; the message is the scheduler's.
        Unschedulable,
        /// False: no node of the cluster has the GPU that is asked for.
        NoMatchingGPUNode,
        /// False: the namespace's ResourceQuota refuses the pod.
        QuotaExceeded,
        /// False: a LimitRange of the namespace refuses the pod.
        LimitRangeViolated,
        /// False: the namespace's Pod Security level, or OpenShift's security context constraints, refuse the pod.
        PodSecurityViolation,
        /// False: an admission webhook or a ValidatingAdmissionPolicy refuses the pod, or the webhook does not answer.
        AdmissionDenied,
        /// False: `serviceAccountName` does not exist.
        ServiceAccountNotFound,
        /// False: `scheduling.priorityClassName` does not exist.
        PriorityClassNotFound,
        /// False: `scheduling.runtimeClassName` does not exist.
        RuntimeClassNotFound,
        /// False: the API server refuses the pod for another reason; the message is its own.
        PodRejected,
    }
}

closed_enum! {
    /// Reasons of `Running`.
    RunningReason {
        /// True: steps are being done.
        Training,
        /// False: the trainer starts.
        Starting,
        /// False: the image is being pulled.
        PullingImage,
        /// False: the model is being fetched.
        DownloadingModel,
        /// False: the dataset is being read.
        DownloadingDataset,
        /// False: captions and pictures are being encoded.
        PreparingData,
        /// False: a checkpoint is being restored.
        RestoringCheckpoint,
        /// False: the outputs are being written.
        Publishing,
        /// False: the image cannot be pulled.
        ImagePullBackOff,
        /// False: the container cannot be created.
        CreateContainerError,
        /// False: a Secret that the spec names does not exist, or misses a key.
        SecretNotFound,
        /// False: a ConfigMap that the pod mounts does not exist, or misses a key.
        ConfigMapNotFound,
        /// False: a volume claim does not exist.
        VolumeNotFound,
        /// False: a volume cannot be attached or mounted.
        VolumeMountFailed,
        /// False: the node cannot set up the pod's sandbox or network.
        PodSandboxFailed,
        /// False: the trainer has finished no step within `progressDeadlineSeconds` and is being restarted.
        NoProgress,
        /// False: the node does not answer; the message names the ways out.
        NodeLost,
        /// False: the last pod ended and the next has not started.
        Restarting,
        /// False: suspended.
        Suspended,
        /// False: ended.
        Finished,
        /// Unknown: the trainer runs and does not answer.
        ProgressUnknown,
        /// False: the Job runs in another cluster (Kueue's MultiKueue), whose pod is not ready.
        StartingOnWorkerCluster,
        /// Unknown: the pod runs in another cluster (Kueue's MultiKueue); what its trainer does cannot be seen from here.
        RunningOnWorkerCluster,
    }
}

closed_enum! {
    /// Reasons of `Suspended`.
    SuspendedReason {
        /// True: `spec.suspend` is true.
        UserRequested,
        /// False: `spec.suspend` is false again.
        Resumed,
    }
}

closed_enum! {
    /// Reasons of `Checkpointed`.
    CheckpointedReason {
        /// True: the newest one is in `status.lastCheckpoint`.
        Saved,
        /// False: none so far.
        NoneYet,
        /// False: the bucket refuses it; training goes on.
        UploadFailed,
    }
}

closed_enum! {
    /// Reasons of `Complete`.
    CompleteReason {
        /// True: trained and published.
        TrainingSucceeded,
        /// True: the output folder already held the result of this very spec and dataset.
        AlreadyCompleted,
    }
}

closed_enum! {
    /// Reasons of `Reconciling`.
    ReconcilingReason {
        /// True: the batch Job is being created.
        Progressing,
        /// False: nothing left to do for this spec.
        Reconciled,
    }
}

closed_enum! {
    /// Reasons of `Stalled`, besides those of `Failed` and `Validated`, which it repeats.
    StalledReason {
        /// False: the job can go on.
        NotStalled,
    }
}
