//! Every librdkafka error code, as what the relay does about it.
//!
//! Codes and their meaning: librdkafka `rdkafka.h` (`rd_kafka_resp_err_t`, local errors below zero)
//! and the Kafka protocol guide, "Error codes" (broker errors above zero).

use rdkafka::types::RDKafkaErrorCode as Code;

use super::Kind;

/// The kind of a delivery error.
///
/// A code that this table does not know is transient: nothing is lost by trying again, and a stall
/// shows in the metrics; parking on a code that nobody has read could strand a healthy key.
pub fn classify(code: Code) -> Kind {
    match code {
        // This record never.
        Code::BadMessage
        | Code::InvalidMessage
        | Code::InvalidMessageSize
        | Code::MessageSizeTooLarge
        | Code::MessageBatchTooLarge
        | Code::InvalidTimestamp
        | Code::InvalidRecord
        | Code::InvalidDifferentRecord
        | Code::PolicyViolation
        | Code::UnknownPartition
        | Code::InvalidArgument
        | Code::InvalidTopic
        | Code::KeySerialization
        | Code::ValueSerialization
        | Code::UnsupportedForMessageFormat => Kind::Rejected,

        // This producer never. The purge codes are what its other records are told.
        Code::Fatal
        | Code::GaplessGuarantee
        | Code::Fenced
        | Code::ProducerFenced
        | Code::InvalidProducerEpoch
        | Code::OutOfOrderSequenceNumber
        | Code::DuplicateSequenceNumber
        | Code::UnknownProducerId
        | Code::InvalidProducerIdMapping
        | Code::TransactionCoordinatorFenced
        | Code::Inconsistent
        | Code::State
        | Code::MessageTimedOut
        | Code::PurgeQueue
        | Code::PurgeInflight
        | Code::BrokerDestroy
        | Code::DestroyBroker => Kind::Fatal,

        _ => Kind::Transient,
    }
}

/// Whether the cause is the topic and not the record: it is missing, or we may not write to it.
pub fn is_about_topic(code: Code) -> bool {
    matches!(
        code,
        Code::UnknownTopic
            | Code::UnknownTopicOrPartition
            | Code::UnknownTopicId
            | Code::TopicAuthorizationFailed
            | Code::LeaderNotAvailable
    )
}

/// Whether the record or its batch was larger than the topic takes.
pub fn is_about_size(code: Code) -> bool {
    matches!(code, Code::MessageSizeTooLarge | Code::MessageBatchTooLarge | Code::InvalidMessageSize)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code of librdkafka 2.12, reviewed one by one. A code of a later librdkafka is
    /// transient until somebody has read what it means and added it here.
    #[test]
    fn every_code_has_a_reviewed_kind() {
        let rejected = [
            Code::BadMessage,
            Code::UnknownPartition,
            Code::InvalidArgument,
            Code::KeySerialization,
            Code::ValueSerialization,
            Code::InvalidDifferentRecord,
            Code::InvalidMessage,
            Code::InvalidMessageSize,
            Code::MessageSizeTooLarge,
            Code::InvalidTopic,
            Code::MessageBatchTooLarge,
            Code::InvalidTimestamp,
            Code::UnsupportedForMessageFormat,
            Code::PolicyViolation,
            Code::InvalidRecord,
        ];
        let fatal = [
            Code::BrokerDestroy,
            Code::MessageTimedOut,
            Code::State,
            Code::PurgeQueue,
            Code::PurgeInflight,
            Code::Fatal,
            Code::Inconsistent,
            Code::GaplessGuarantee,
            Code::Fenced,
            Code::DestroyBroker,
            Code::OutOfOrderSequenceNumber,
            Code::DuplicateSequenceNumber,
            Code::InvalidProducerEpoch,
            Code::InvalidProducerIdMapping,
            Code::TransactionCoordinatorFenced,
            Code::UnknownProducerId,
            Code::ProducerFenced,
        ];
        let transient = [
            Code::BadCompression,
            Code::Fail,
            Code::BrokerTransportFailure,
            Code::CriticalSystemResource,
            Code::Resolve,
            Code::PartitionEOF,
            Code::FileSystem,
            Code::UnknownTopic,
            Code::AllBrokersDown,
            Code::OperationTimedOut,
            Code::QueueFull,
            Code::ISRInsufficient,
            Code::NodeUpdate,
            Code::SSL,
            Code::WaitingForCoordinator,
            Code::UnknownGroup,
            Code::InProgress,
            Code::PreviousInProgress,
            Code::ExistingSubscription,
            Code::AssignPartitions,
            Code::RevokePartitions,
            Code::Conflict,
            Code::UnknownProtocol,
            Code::NotImplemented,
            Code::Authentication,
            Code::NoOffset,
            Code::Outdated,
            Code::TimedOutQueue,
            Code::UnsupportedFeature,
            Code::WaitCache,
            Code::Interrupted,
            Code::KeyDeserialization,
            Code::ValueDeserialization,
            Code::Partial,
            Code::ReadOnly,
            Code::NoEnt,
            Code::Underflow,
            Code::InvalidType,
            Code::Retry,
            Code::PollExceeded,
            Code::UnknownBroker,
            Code::NotConfigured,
            Code::Application,
            Code::AssignmentLost,
            Code::Noop,
            Code::AutoOffsetReset,
            Code::LogTruncation,
            Code::Unknown,
            Code::OffsetOutOfRange,
            Code::UnknownTopicOrPartition,
            Code::LeaderNotAvailable,
            Code::NotLeaderForPartition,
            Code::RequestTimedOut,
            Code::BrokerNotAvailable,
            Code::ReplicaNotAvailable,
            Code::StaleControllerEpoch,
            Code::OffsetMetadataTooLarge,
            Code::NetworkException,
            Code::CoordinatorLoadInProgress,
            Code::CoordinatorNotAvailable,
            Code::NotCoordinator,
            Code::NotEnoughReplicas,
            Code::NotEnoughReplicasAfterAppend,
            Code::InvalidRequiredAcks,
            Code::IllegalGeneration,
            Code::InconsistentGroupProtocol,
            Code::InvalidGroupId,
            Code::UnknownMemberId,
            Code::InvalidSessionTimeout,
            Code::RebalanceInProgress,
            Code::InvalidCommitOffsetSize,
            Code::TopicAuthorizationFailed,
            Code::GroupAuthorizationFailed,
            Code::ClusterAuthorizationFailed,
            Code::UnsupportedSASLMechanism,
            Code::IllegalSASLState,
            Code::UnsupportedVersion,
            Code::TopicAlreadyExists,
            Code::InvalidPartitions,
            Code::InvalidReplicationFactor,
            Code::InvalidReplicaAssignment,
            Code::InvalidConfig,
            Code::NotController,
            Code::InvalidRequest,
            Code::InvalidTransactionalState,
            Code::InvalidTransactionTimeout,
            Code::ConcurrentTransactions,
            Code::TransactionalIdAuthorizationFailed,
            Code::SecurityDisabled,
            Code::OperationNotAttempted,
            Code::KafkaStorageError,
            Code::LogDirNotFound,
            Code::SaslAuthenticationFailed,
            Code::ReassignmentInProgress,
            Code::DelegationTokenAuthDisabled,
            Code::DelegationTokenNotFound,
            Code::DelegationTokenOwnerMismatch,
            Code::DelegationTokenRequestNotAllowed,
            Code::DelegationTokenAuthorizationFailed,
            Code::DelegationTokenExpired,
            Code::InvalidPrincipalType,
            Code::NonEmptyGroup,
            Code::GroupIdNotFound,
            Code::FetchSessionIdNotFound,
            Code::InvalidFetchSessionEpoch,
            Code::ListenerNotFound,
            Code::TopicDeletionDisabled,
            Code::FencedLeaderEpoch,
            Code::UnknownLeaderEpoch,
            Code::UnsupportedCompressionType,
            Code::StaleBrokerEpoch,
            Code::OffsetNotAvailable,
            Code::MemberIdRequired,
            Code::PreferredLeaderNotAvailable,
            Code::GroupMaxSizeReached,
            Code::FencedInstanceId,
            Code::EligibleLeadersNotAvailable,
            Code::ElectionNotNeeded,
            Code::NoReassignmentInProgress,
            Code::GroupSubscribedToTopic,
            Code::UnstableOffsetCommit,
            Code::ThrottlingQuotaExceeded,
            Code::ResourceNotFound,
            Code::DuplicateResource,
            Code::UnacceptableCredential,
            Code::InconsistentVoterSet,
            Code::InvalidUpdateVersion,
            Code::FeatureUpdateFailed,
            Code::PrincipalDeserializationFailure,
            Code::UnknownTopicId,
            Code::FencedMemberEpoch,
            Code::UnreleasedInstanceId,
            Code::UnsupportedAssignor,
            Code::StaleMemberEpoch,
            Code::UnknownSubscriptionId,
            Code::TelemetryTooLarge,
            Code::RebootstrapRequired,
        ];
        for (codes, kind) in
            [(&rejected[..], Kind::Rejected), (&fatal[..], Kind::Fatal), (&transient[..], Kind::Transient)]
        {
            for code in codes {
                assert_eq!(classify(*code), kind, "{code:?}");
            }
        }
        let distinct: std::collections::HashSet<String> =
            rejected.iter().chain(&fatal).chain(&transient).map(|code| format!("{code:?}")).collect();
        assert_eq!(distinct.len(), rejected.len() + fatal.len() + transient.len());
        assert_eq!(distinct.len(), 169, "librdkafka 2.12 has this many codes");
    }
}
