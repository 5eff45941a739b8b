// Reads a topic to its end with a deserializer that others wrote, and prints a JSON line for each record:
// partition, offset, key, and size and SHA-256 of the value that the application is given.
//
// Every argument is NAME=VALUE, a property of the consumer, but the first, which is the topic.

import com.bakdata.kafka.LargeMessageDeserializer;
import java.security.MessageDigest;
import java.time.Duration;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.serialization.StringDeserializer;

public final class LargeMessageReader {
    public static void main(String[] arguments) throws Exception {
        Properties properties = new Properties();
        properties.put("key.deserializer", StringDeserializer.class);
        properties.put("value.deserializer", LargeMessageDeserializer.class);
        properties.put("large.message.value.serde", Serdes.ByteArraySerde.class);
        properties.put("large.message.use.headers", "true");
        properties.put("enable.auto.commit", "false");
        for (String argument : List.of(arguments).subList(1, arguments.length)) {
            String[] property = argument.split("=", 2);
            properties.put(property[0], property[1]);
        }
        try (KafkaConsumer<String, byte[]> consumer = new KafkaConsumer<>(properties)) {
            List<TopicPartition> partitions = consumer.partitionsFor(arguments[0]).stream()
                    .map(info -> new TopicPartition(info.topic(), info.partition()))
                    .toList();
            consumer.assign(partitions);
            consumer.seekToBeginning(partitions);
            Map<TopicPartition, Long> ends = consumer.endOffsets(partitions);
            while (partitions.stream().anyMatch(one -> consumer.position(one) < ends.get(one))) {
                for (ConsumerRecord<String, byte[]> record : consumer.poll(Duration.ofMillis(200))) {
                    System.out.println(line(record));
                }
            }
        }
    }

    private static String line(ConsumerRecord<String, byte[]> record) throws Exception {
        byte[] value = record.value();
        String size = value == null ? "null" : Integer.toString(value.length);
        String digest = value == null ? "null" : quoted(sha256(value));
        return "{\"partition\":" + record.partition() + ",\"offset\":" + record.offset()
                + ",\"key\":" + (record.key() == null ? "null" : quoted(record.key()))
                + ",\"size\":" + size + ",\"sha256\":" + digest + "}";
    }

    private static String sha256(byte[] value) throws Exception {
        return HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(value));
    }

    private static String quoted(String text) {
        StringBuilder quoted = new StringBuilder("\"");
        text.chars().forEach(c -> {
            boolean plain = c >= ' ' && c != '"' && c != '\\';
            quoted.append(plain ? Character.toString(c) : String.format("\\u%04x", c));
        });
        return quoted.append('"').toString();
    }
}
